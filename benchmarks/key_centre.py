r"""What codes of 4 bits lose where keys have a bias, encoded whole and less their centre, and int8 beside them.

    python benchmarks/key_centre.py --model qwen05.gguf --text pg19.txt wiki.txt python --device cuda \
        --prompt 4096 8192 16384 32256 --out benchmarks/results/key_centre_h200.csv

Nothing is evicted of a prompt, and the tokens behind it are scored in one forward over what the cache gives back:
perplexity, and the divergence from the full cache, KL(full || row). Of a text that is too short for as many sequences
there are as many as it holds, and of a length that none holds there are no rows. Rows are written as they come, and
those that are there are not measured again. Rows whose keys are "less their mean over N positions" are of former
centres.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from formats_frontier import judged
from kvpolicy_kernels.formats import INT4, INT8, EntryFormat
from shared import command_line, machine, read_csv, write_csv
from torch import Tensor

import kvpolicy
from kvpolicy.integrations.transformers.model.versions import with_cache
from kvpolicy.measure.stats import mean_interval

ROWS: dict[tuple[str, str], EntryFormat | None] = {
    ("model", ""): None,
    ("int8", ""): INT8,
    ("int4", "less their centre"): INT4,
    ("int4", "whole"): replace(INT4, centred=False),
}


@torch.no_grad()
def measured(model: Any, ids: Tensor, prompt: int, own: EntryFormat | None) -> Tensor:
    """Logits [n, vocabulary] behind each token of `ids` from the last of the prompt on, but the last."""
    cache = kvpolicy.new_cache(model, retention=1.0, format=own)
    before = model(ids[None, :prompt], **with_cache(model, cache), use_cache=True, logits_to_keep=1).logits
    after = model(ids[None, prompt:-1], **with_cache(model, cache), use_cache=True).logits
    return torch.cat([before, after], 1)[0]


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", nargs="+", default=["python"], help="files, or 'python' for CPython's own reference")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompt", type=int, nargs="+", default=[1024])
    parser.add_argument("--behind", type=int, default=512)
    parser.add_argument("--sequences", type=int, default=2, help="of each text")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    model, tokenizer = kvpolicy.load_model(options.model, dtype=options.dtype, device=options.device)
    texts = [kvpolicy.read_corpus(tokenizer, None if name == "python" else name) for name in options.text]
    lines: list[dict[str, Any]] = [*read_csv(options.out)] if options.out.exists() else []
    for prompt in options.prompt:
        length = prompt + options.behind
        counts = [min(options.sequences, text.room("whole", length)) for text in texts]
        whole = [text.sequences("whole", count, length) for text, count in zip(texts, counts, strict=True) if count]
        if not whole:
            print(f"no text holds a prompt of {prompt}", flush=True)
            continue
        used = [Path(name).stem for name, count in zip(options.text, counts, strict=True) if count]
        about = {
            "n": sum(counts), "prompt": prompt, "scored": options.behind, "model": Path(options.model).name,
            "dtype": options.dtype, "texts": " ".join(used), **machine(options.device, "torch", "transformers"),
        }  # fmt: skip
        report(model, torch.cat(whole).to(model.device), about, lines, options.out)


def report(model: Any, sequences: Tensor, about: dict[str, Any], lines: list[dict[str, Any]], out: Path) -> None:
    """Adds the rows of a length of prompts to `lines` and writes them, but for those that are there."""
    prompt, texts = about["prompt"], about["texts"]
    there = {(x["format"], x["keys"]) for x in lines if (int(x["prompt"]), x["texts"]) == (prompt, texts)}
    if there >= ROWS.keys():
        return
    full: list[Tensor] = []
    for (name, keys), own in ROWS.items():
        if (name, keys) in there and own is not None:
            continue
        both = [
            judged(full, index, measured(model, ids, prompt, own), ids[prompt:]) for index, ids in enumerate(sequences)
        ]
        if (name, keys) in there:  # the full cache, which others are compared with
            continue
        losses, divergences = (torch.stack([x.mean() for x in each]).double().cpu() for each in zip(*both, strict=True))
        low, high = mean_interval(divergences)
        lines.append(
            {"format": name, "keys": keys, "perplexity": round(float(losses.mean().exp()), 3),
             "kl": round(float(divergences.mean()), 5), "kl_low": round(low, 5), "kl_high": round(high, 5),
             **about, "each_kl": " ".join(f"{kl:.5f}" for kl in divergences.tolist())}
        )  # fmt: skip
        print(prompt, *list(lines[-1].values())[:7], sep="\t", flush=True)
        write_csv(out, lines)


if __name__ == "__main__":
    main()
