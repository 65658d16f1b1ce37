r"""Quality over measured bytes: caches in the model's dtype, int8 and int4, under equal and under learned capacities.

    python benchmarks/formats_frontier.py --text pg19.txt wiki.txt --plan snapkv_learned.json \
        --out benchmarks/results/formats_frontier_cpu.csv

The caches are real ones. A prompt attends densely and is compressed once, and the tokens behind it, which stay exact,
are scored in one forward over what the cache holds: perplexity, and the divergence from the full cache,
KL(full || row). Bytes are every tensor of one cache behind its prompt (codes, steps, zeros, positions, scores, exact
blocks, tables), over the keys and values of the whole prompt in the model's dtype. At each level a format keeps as many
entries as take the bytes of a window rule's in that dtype, as `kvpolicy compare snapkv@int4` counts them. Rows are
written as they come.

    python benchmarks/formats_frontier.py --text pg19.txt wiki.txt --formats model think int8 --sharing 1 4 \
        --out benchmarks/results/axes_frontier_cpu.csv

ThinK, and KVSharer with so many layers, by its rule and with the most similar layers first, beside them: maps from 30
pieces of 64 tokens of the first text's end.

    python benchmarks/formats_frontier.py --protocol window --prompt 4096 --text pg19.txt wiki.txt python \
        --plan learned.json --out benchmarks/results/formats_window_h200.csv

The other protocol: a sequence of `--prompt` tokens is decoded under the window rule from its first token on, every
entry as the format gives it back, and its last three quarters are scored. The text `python` is CPython's own reference.
Begun again with the same `--out`, rows that are there are not measured again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from shared import command_line, machine, read_csv, write_csv
from torch import Tensor

import kvpolicy
from kvpolicy import ModelSpec, TransformersProbe
from kvpolicy.comparison.methods import Method, read_asked
from kvpolicy.integrations.transformers import Prompts, attached, find_sharing
from kvpolicy.integrations.transformers.model.versions import with_cache
from kvpolicy.measure.stats import mean_interval

FORMATS = ("model", "int8", "int4")
CAPACITIES = ("everything", "equal", "plan")
PIECES, PIECE = 30, 64  # of KVSharer's calibration
ROWS = 512  # of logits at a time
POLICIES = {"prompt": "snapkv(num_sink_tokens=4)", "window": "streaming"}


class Window(TransformersProbe):
    """The losses of a probe, and beside each the divergence from the full cache's logits."""

    def __init__(self, model: Any, sequences: Tensor, method: Method, full: list[Tensor]) -> None:
        sinks = method.policy.num_sink_tokens
        super().__init__(model, sequences, num_sink_tokens=sinks, entry_format=method.entry_format)
        self.full = full

    def losses_of(self, ids: Tensor) -> Tensor:
        """float32 [1, n, 2]."""
        index = int((self.sequences.to(ids.device) == ids).all(1).nonzero()[0])
        return torch.stack(judged(self.full, index, self.scored_logits(ids)[0], ids[0, self.first_scored :]), -1)[None]


class WindowStudy:
    """Sequences decoded from their first token on; logits of the full cache."""

    def __init__(self, model: Any, sequences: Tensor) -> None:
        self.model, self.sequences = model, sequences
        self.spec = ModelSpec.from_config(model.config)
        self.full: list[Tensor] = []

    def measured(self, method: Method, table: Tensor, shared: dict[int, int]) -> tuple[list[float], list[float], float]:
        """As `Study`, and the bytes of one cache that has seen a sequence."""
        probe = Window(self.model, self.sequences, method, self.full)
        means = [both[0].double().mean(0).tolist() for both in probe.token_losses(table)]
        return [loss for loss, _ in means], [kl for _, kl in means], probe.filled(table).nbytes


def judged(full: list[Tensor], index: int, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and KL(full || row) of n tokens. full: logits of each sequence, as the model gives them; the first to come
    are kept: of 16 sequences of 4096 tokens and a vocabulary of 152k 15 GB, and twice as much in float32
    """
    losses, divergences = [], []
    if len(full) == index:
        full.append(logits)
    for rows in range(0, len(logits), ROWS):
        own, known = (x[rows : rows + ROWS].float().log_softmax(-1) for x in (logits, full[index]))
        losses.append(F.nll_loss(own, targets[rows : rows + ROWS], reduction="none"))
        divergences.append((known.exp() * (known - own)).sum(-1))
    return torch.cat(losses), torch.cat(divergences)


class Study:
    """Prompts of one policy in one format, run once for all tables; logits of the full cache."""

    def __init__(self, model: object, sequences: Tensor, prompt: int) -> None:
        self.model, self.sequences, self.prompt = model, sequences, prompt
        self.spec = ModelSpec.from_config(model.config)
        self.full: list[Tensor] = []
        self.prompts: Prompts | None = None

    def measured(self, method: Method, table: Tensor, shared: dict[int, int]) -> tuple[list[float], list[float], float]:
        """(losses, divergences) of the sequences, and the bytes of the mean cache."""
        kind = method.entry_format, shared
        if self.prompts is None or (self.prompts.entry_format, self.prompts.shared_layers) != kind:
            self.prompts = None
            batches = torch.split(self.sequences[:, : self.prompt], 1)
            self.prompts = Prompts(
                self.model, batches, method.policy, entry_format=method.entry_format, shared_layers=shared
            )
        losses, divergences, nbytes = [], [], 0
        for index, ids in enumerate(self.sequences):
            with torch.no_grad(), attached(self.model):
                cache, before = self.prompts.compressed(index, table)
                nbytes += cache.nbytes
                cache.hold(len(ids) - self.prompt - 1)
                behind = ids[None, self.prompt : -1]
                after = self.model(behind, **with_cache(self.model, cache), use_cache=True).logits
            own = judged(self.full, index, torch.cat([before, after], 1)[0], ids[self.prompt :])
            losses.append(float(own[0].mean()))
            divergences.append(float(own[1].mean()))
        return losses, divergences, nbytes / len(self.sequences)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--text", nargs="+", required=True, help="files, or 'python' for CPython's own reference")
    parser.add_argument("--plan", type=Path, nargs="*", default=[], help="whose capacities are used besides equal ones")
    parser.add_argument("--capacities", nargs="+", choices=CAPACITIES, default=CAPACITIES)
    parser.add_argument("--protocol", choices=list(POLICIES), default="prompt")
    parser.add_argument("--policy", help="snapkv behind a prompt, streaming from the first token on")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--behind", type=int, default=512)
    parser.add_argument("--sequences", type=int, default=2, help="of each text")
    parser.add_argument("--bytes", type=float, nargs="+", default=[0.3, 0.15, 0.1, 0.075], dest="levels")
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--sharing", type=int, nargs="*", default=[], help="numbers of layers that share")
    options = parser.parse_args()
    options.policy = options.policy or POLICIES[options.protocol]
    if options.protocol == "window":
        options.behind = 0
        if options.sharing:
            parser.error("--sharing is measured behind a prompt: leave out --protocol window")
    model, tokenizer = kvpolicy.load_model(options.model, dtype=options.dtype, device=options.device)
    length = options.prompt + options.behind
    corpora = [kvpolicy.read_corpus(tokenizer, None if name == "python" else name) for name in options.text]
    sequences = torch.cat([corpus.sequences("whole", options.sequences, length) for corpus in corpora])
    on_device = sequences.to(model.device)
    study = Study(model, on_device, options.prompt) if options.behind else WindowStudy(model, on_device)
    pieces = corpora[0].whole[-PIECES * PIECE :].view(PIECES, PIECE)
    maps: dict[str, dict[int, int]] = {}
    for similar in (False, True) if options.sharing else ():
        found = find_sharing(model, pieces, max(options.sharing), most_similar=similar).shared_layers
        for count in options.sharing:  # the rule takes one layer after the other
            maps[f"share {count}, {'most similar' if similar else 'as published'}"] = dict([*found.items()][:count])
    print(maps, flush=True)
    report(study, maps, options)


def report(study: Study | WindowStudy, maps: dict[str, dict[int, int]], options: argparse.Namespace) -> None:
    model, whole = study.model, torch.full(study.spec.table_shape, options.prompt)
    dense = int(whole.sum()) * study.spec.entry_bytes(model.dtype.itemsize)
    lines: list[dict[str, Any]] = [*read_csv(options.out)] if options.out.exists() else []
    there = {(line["format"], line["capacities"], float(line["level"])) for line in lines}
    study.measured(read_asked([options.policy])[0], whole, {})  # the full cache's logits
    rows = [(name, name, {}) for name in options.formats]
    rows += [(f"{name} {json.dumps(list(shared.items()))}", "model", shared) for name, shared in maps.items()]
    kinds = [kind for kind in options.capacities if kind != "plan"]
    kinds += map(str, options.plan if "plan" in options.capacities else [])
    for row, name, shared in rows:
        spec = study.spec.sharing(shared)
        for capacities in kinds:
            (method,) = read_asked([f"{options.policy}{'/' + capacities if '.json' in capacities else ''}@{name}"])
            for level in [1.0] if capacities == "everything" else options.levels:
                if (row, Path(capacities).stem, level) in there:
                    continue
                begun = time.perf_counter()
                most = level * len(study.spec.budgeted_layers) / len(spec.budgeted_layers)  # of what is left
                table = whole[: len(spec.budgeted_layers)]
                if level < 1:
                    table = method.table(spec, options.prompt, most, 0, model.dtype)
                losses, divergences, nbytes = study.measured(method, table, shared)
                low, high = mean_interval(torch.tensor(divergences))
                lines.append(
                    {"format": row, "capacities": Path(capacities).stem, "level": level,
                     "bytes": round(nbytes / dense, 4), "entries": round(int(table.sum()) / int(whole.sum()), 4),
                     "perplexity": round(float(torch.tensor(losses).mean().exp()), 3),
                     "kl": round(sum(divergences) / len(divergences), 5), "kl_low": round(low, 5),
                     "kl_high": round(high, 5), "n": len(losses), "prompt": options.prompt,
                     "scored": options.behind or options.prompt - options.prompt // 4,
                     "model": Path(options.model).name, "dtype": options.dtype, "policy": options.policy,
                     "texts": " ".join(Path(name).stem for name in options.text),
                     "seconds": round(time.perf_counter() - begun), **machine(options.device, "torch", "transformers"),
                     "protocol": options.protocol, "each_kl": " ".join(f"{kl:.5f}" for kl in divergences)}
                )  # fmt: skip
                print(*list(lines[-1].values())[:9], sep="\t", flush=True)
                write_csv(options.out, lines)


if __name__ == "__main__":
    main()
