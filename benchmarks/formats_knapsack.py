r"""Bits by a knapsack for each prompt, as RDKV spends them, beside the rows of `formats_study.py`: a reconstruction.

    python benchmarks/formats_knapsack.py --text pg19.txt wiki.txt --out benchmarks/results/formats_knapsack_cpu.csv

RDKV, arXiv:2605.08317, gives each token's value and each channel of the keys 0, 2, 4, 8 or 16 bits: those that lose
least of all that take no more bytes. What a token matters is snapkv's attention, what a channel matters ThinK's product
of mean squares, and what so many bits lose of either is a figure of the model (2 bits: values .31, keys .15; 4 bits:
.014, .006). So far its code; the paper's text was not readable. Taken for granted here: both are parts of their head's
sum and weigh the same; 8 bits lose a 256th of what 4 do; one knapsack for the whole model; a token whose value has no
bits is evicted; the sink tokens and the last 32 tokens are exact; steps and minima are KIVI's, of 32 numbers each.
Counted are codes, steps, minima, positions, and 3 bits for each choice. Prompts, texts and what is scored are those of
`formats_study.py`.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from formats_study import KIVI_GROUP, POSITION, Study, judged, rebuilt, stepped
from shared import command_line, machine, write_csv
from torch import Tensor

import kvpolicy
from kvpolicy.measure.stats import mean_interval

BITS = torch.tensor([0, 2, 4, 8, 16])
VALUE_LOSS = torch.tensor([1, 0.31, 0.014, 0.014 / 256, 0])
KEY_LOSS = torch.tensor([1, 0.15, 0.006, 0.006 / 256, 0])
STEPS = torch.tensor([0, 4, 4, 4, 0])  # bytes of a step and a minimum
CHOICE = 3 / 8  # bytes that tell one of five


def knapsack(tokens: Tensor, channels: Tensor, allowed: float) -> tuple[Tensor, Tensor, float]:
    """(bits of values [L, H, n], bits of key channels [L, H, D], their bytes), at most `allowed` bytes.

    tokens:   [L, H, n] what each matters, infinite where it is exact
    channels: [L, H, D]
    """
    dim, exact = channels.shape[-1], tokens.isinf()
    fixed = int(exact.sum()) * (4 * dim + POSITION) + (channels.numel() + int((~exact).sum())) * CHOICE
    tokens = tokens.masked_fill(exact, 0.0)
    tokens = tokens / tokens.sum(-1, keepdim=True)
    channels = channels / channels.sum(-1, keepdim=True)
    value_bytes = BITS * dim / 8 + STEPS * dim / KIVI_GROUP + POSITION * (BITS > 0)
    key_bytes = BITS / 8 + STEPS / KIVI_GROUP  # of one token

    def at(price: float) -> tuple[Tensor, Tensor, float]:
        row = torch.full((*tokens.shape[:2], 1, 1), float(key_bytes[2]) * dim)  # of a token's keys
        for _ in range(4):
            cost = value_bytes + row * (BITS > 0)
            values = (tokens[..., None] * VALUE_LOSS + price * cost).argmin(-1).masked_fill(exact, 0)
            kept = (values > 0).sum(-1)[..., None, None]
            keys = (channels[..., None] * KEY_LOSS + price * kept * key_bytes).argmin(-1)
            row = key_bytes[keys].sum(-1)[..., None, None]
        spent = float(value_bytes[values].sum() + (kept * row).sum())
        return BITS[values].masked_fill(exact, 16), BITS[keys], spent + fixed

    low, high = -30.0, 0.0  # powers of e
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if at(float(torch.tensor(middle).exp()))[2] <= allowed else (middle, high)
    return at(float(torch.tensor(high).exp()))


def coded(rows: Tensor, bits: Tensor) -> Tensor:
    """Rows [n, m], each in so many bits, a step for `KIVI_GROUP` numbers of it."""
    out = rows.clone()
    for count in BITS[:-1].tolist():
        chosen = bits == count
        for begin in range(0, rows.shape[1], KIVI_GROUP):
            part = rows[chosen, begin : begin + KIVI_GROUP]
            if part.numel():
                out[chosen, begin : begin + KIVI_GROUP] = stepped(part, 1, count) if count else torch.zeros_like(part)
    return out


def measured(study: Study, ids: Tensor, levels: list[float]) -> list[tuple[float, float, float, float]]:
    """(bytes, entries, loss, divergence) of a sequence at each level."""
    prompt = study.prompt
    cache, queries, scores = study.prompted(ids, {})
    kept = [(layer.keys, layer.values) for layer in cache.layers]
    pairs = zip(queries, kept, strict=True)
    channels = torch.stack([q.square().mean((0, 2)) * keys[0].square().mean(1) for q, (keys, _) in pairs])
    tokens, dense = torch.stack(scores), channels.numel() * prompt * 4
    full = study.forward(ids[prompt:-1], rebuilt(kept)).log_softmax(-1)
    out = []
    for level in levels:
        value_bits, key_bits, spent = knapsack(tokens, channels, level * dense)
        rows, study.keep = [], []
        for layer, (keys, values) in enumerate(kept):
            keys, values = keys.clone(), values.clone()
            for head, bits in enumerate(value_bits[layer]):
                past = (bits > 0) & tokens[layer, head].isfinite()
                keys[0, head, past] = coded(keys[0, head, past].T, key_bits[layer, head]).T
                values[0, head, past] = coded(values[0, head, past], bits[past])
            rows.append((keys, values))
            study.keep.append(value_bits[layer] > 0)
        logits = study.forward(ids[prompt:-1], rebuilt(rows)).log_softmax(-1)
        entries = float((value_bits > 0).float().mean())
        out.append((spent / dense, entries, *judged(full, logits, ids[prompt + 1 :])))
    return out


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--behind", type=int, default=512)
    parser.add_argument("--sequences", type=int, default=2, help="of each text")
    parser.add_argument("--bytes", type=float, nargs="+", default=[0.3, 0.15, 0.075], dest="levels")
    options = parser.parse_args()
    study, begun = Study(options.model, options.prompt), time.perf_counter()
    corpora = [kvpolicy.read_corpus(study.tokenizer, path) for path in options.text]
    length = options.prompt + options.behind
    sequences = torch.cat([corpus.sequences("whole", options.sequences, length) for corpus in corpora])
    found = []
    for ids in sequences:
        found.append(measured(study, ids, options.levels))
        print(found[-1], flush=True)
    lines = []
    for level, figures in zip(options.levels, zip(*found, strict=True), strict=True):
        nbytes, entries, losses, divergences = torch.tensor(figures, dtype=torch.float64).T
        low, high = mean_interval(divergences)
        lines.append(
            {"row": "knapsack", "level": level, "bytes": round(float(nbytes.mean()), 4),
             "entries": round(float(entries.mean()), 4), "perplexity": round(float(losses.mean().exp()), 3),
             "kl": round(float(divergences.mean()), 5), "kl_low": round(low, 5), "kl_high": round(high, 5),
             "n": len(losses), "prompt": options.prompt, "scored": options.behind - 1, "model": options.model,
             "texts": " ".join(path.stem for path in options.text),
             "seconds_of_all": round(time.perf_counter() - begun), **machine("cpu", "torch", "transformers")}
        )  # fmt: skip
        print(*list(lines[-1].values())[:9], sep="\t", flush=True)
    write_csv(options.out, lines)


if __name__ == "__main__":
    main()
