r"""What makes learned budgets better: one thing changed at a time, reported on texts that nothing was learned on.

    python benchmarks/learned_variants.py --search books.txt --report other.txt wiki.txt --importance power.json \
        --out DIR
    python benchmarks/learned_variants.py --table DIR

Every variant learns each retention on the same sequences and is measured under the window rule, decoded from the first
token on. `--importance` is a plan whose estimator measured something to start from. Writes DIR/VARIANT.json, which a
later run does not measure again, and with --table DIR.md: the part of uniform's excess perplexity that is left.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from kvpolicy_baselines.learned import LearnedAllocator, SoftCapacities, capacities_of
from shared import command_line
from torch import Tensor

import kvpolicy
from kvpolicy import Budget, Importance, ModelProbe, ModelSpec, TransformersProbe, apportion
from kvpolicy.files.regular import write_bytes
from kvpolicy.measure.stats import excess_share, paired_difference


@dataclass(frozen=True)
class Variant:
    """options: of the allocator;  start: "uniform", "importance" or "larger", the retention before it

    joint: one training, whose steps take the retentions in turn, for all of them
    learned_sinks: how many of a head's entries are its first tokens is learned with its capacity
    """

    options: dict[str, Any]
    start: str = "uniform"
    joint: bool = False
    learned_sinks: bool = False
    num_sequences: int = 48
    num_sink_tokens: int = 4


VARIANTS = {
    "default": Variant({}),
    "seed 1": Variant({"seed": 1}),
    "from sensitivity": Variant({"start_exponent": 1.0}, start="importance"),
    "from half its logarithm": Variant({"start_exponent": 0.5}, start="importance"),
    "280 steps": Variant({"steps": 280}),
    "one training": Variant({"steps": 280}, joint=True),
    "from the larger level": Variant({"start_exponent": 1.0}, start="larger"),
    "rate 0.16": Variant({"learning_rate": 0.16}),
    "edges end at 0.02": Variant({"tau_end": 0.02}),
    "learned sink tokens": Variant({}, learned_sinks=True),
    "16 sink tokens": Variant({}, num_sink_tokens=16),
    "70 steps": Variant({"steps": 70}),
    "8 sequences": Variant({}, num_sequences=8),
    "rate 0.04": Variant({"learning_rate": 0.04}),
    "edges begin at 0.7": Variant({"tau_start": 0.7}),
    "1 sink token": Variant({}, num_sink_tokens=1),
    "560 steps": Variant({"steps": 560}),
}


class Bench:
    """What all variants share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.context = options, options.context
        self.model, tokenizer = kvpolicy.load_model(options.model, device=options.device, dtype=options.dtype)
        self.spec = ModelSpec.from_config(self.model.config)
        self.search = kvpolicy.read_corpus(tokenizer, options.search)
        texts = {path.stem: kvpolicy.read_corpus(tokenizer, path) for path in options.report}
        texts["python"] = kvpolicy.read_corpus(tokenizer)
        self.report = {
            name: text.sequences("whole", min(options.limit, text.room("whole", self.context)), self.context)
            for name, text in texts.items()
        }

    def probe(self, sequences: Tensor, num_sink_tokens: int) -> TransformersProbe:
        return TransformersProbe(self.model, sequences, num_sink_tokens=num_sink_tokens, batch_size=8)

    def budget(self, retention: float, num_sink_tokens: int) -> Budget:
        total = self.spec.total_entries(retention, self.context)
        return Budget(total, self.spec.table_shape, num_sink_tokens + 1, self.context)

    def losses(self, table: Tensor, num_sink_tokens: int = 4) -> dict[str, list[float]]:
        """Of each sequence of each text."""
        return {name: self.probe(x, num_sink_tokens).loss(table).tolist() for name, x in self.report.items()}

    def references(self) -> dict[str, Any]:
        """The full cache, and uniform budgets at each retention."""
        uniform = torch.ones(self.spec.table_shape)
        tables = {f"{r:g}": apportion(uniform, self.budget(r, 4)) for r in self.options.retention}
        full = torch.full(self.spec.table_shape, self.context)
        return {"full": self.losses(full), "uniform": {name: self.losses(table) for name, table in tables.items()}}

    def measure(self, variant: Variant) -> dict[str, Any]:
        sequences = self.search.sequences("search", variant.num_sequences, self.context)
        probe, begun = self.probe(sequences, variant.num_sink_tokens), time.monotonic()
        if variant.learned_sinks:
            return self.with_sinks(variant, sequences)
        budgets = {r: self.budget(r, variant.num_sink_tokens) for r in self.options.retention}
        learn = together if variant.joint else self.one_by_one
        shares = learn(probe, budgets, variant)
        seconds = time.monotonic() - begun
        losses = {
            f"{r:g}": self.losses(apportion(each, budgets[r]), variant.num_sink_tokens) for r, each in shares.items()
        }
        return {"variant": asdict(variant), "seconds": seconds, "losses": losses}

    def one_by_one(self, probe: ModelProbe, budgets: dict[float, Budget], variant: Variant) -> dict[float, Tensor]:
        importance = Importance(torch.ones(self.spec.table_shape))
        if variant.start == "importance":
            importance = kvpolicy.load_plan(self.options.importance).importance
        allocator, shares = LearnedAllocator(**variant.options), {}
        for retention, budget in budgets.items():
            shares[retention] = allocator.fit(probe, importance, budget)
            if variant.start == "larger":
                importance = Importance((shares[retention] - budget.floors()).float())
        return shares

    def with_sinks(self, variant: Variant, sequences: Tensor) -> dict[str, Any]:
        """As `measure`. Caches have one number of sink tokens, so these are measured under a mask."""
        probe, begun = self.probe(sequences, 0), time.monotonic()
        learned = {r: capacities_and_sinks(probe, self.budget(r, 1), variant) for r in self.options.retention}
        seconds, losses, counts = time.monotonic() - begun, {}, {}
        for retention, (capacities, sinks) in learned.items():
            table = apportion(capacities, self.budget(retention, 1))
            sinks = torch.minimum(sinks.round().long(), table - 1)
            with torch.no_grad():
                held = Visible(table - sinks, sinks)
                losses[f"{retention:g}"] = {
                    name: self.probe(x, 0).soft_loss(held, "text").tolist() for name, x in self.report.items()
                }
            counts[f"{retention:g}"] = sinks.tolist()
        return {"variant": asdict(variant), "seconds": seconds, "losses": losses, "sink_tokens": counts}


@dataclass(frozen=True)
class Visible:
    """What a window and sink tokens of each head leave visible, both int64 [L, H]: 0, and minus infinity elsewhere."""

    windows: Tensor
    sinks: Tensor

    def __call__(self, layer: int, rank: Tensor) -> Tensor:
        windows, sinks = (x[layer].to(rank.device)[:, None, None] for x in (self.windows, self.sinks))
        seen = (rank < windows) | (torch.arange(rank.shape[-1], device=rank.device) < sinks)
        return torch.zeros(seen.shape, device=rank.device).masked_fill(~seen, float("-inf"))


@dataclass(frozen=True)
class SoftlyVisible:
    """The same with soft edges: an entry is seen if its window or its sink tokens let it, log(a + b - ab)."""

    windows: Tensor
    sinks: Tensor
    tau: float

    def __call__(self, layer: int, rank: Tensor) -> Tensor:
        window = self._edge(self.windows[layer], rank)
        sink = self._edge(self.sinks[layer], torch.arange(rank.shape[-1], device=rank.device))
        return torch.logaddexp(F.logsigmoid(window), F.logsigmoid(sink) + F.logsigmoid(-window))

    def _edge(self, count: Tensor, place: Tensor) -> Tensor:
        edge = (count + 0.5).log().float().to(place.device)[:, None, None]
        return (edge - torch.log1p(place.float())) / self.tau


def capacities_and_sinks(probe: ModelProbe, budget: Budget, variant: Variant) -> tuple[Tensor, Tensor]:
    """As `LearnedAllocator.fit`, with the logarithm of each head's sink tokens learned beside it, from 4 on."""
    allocator = LearnedAllocator(**variant.options)
    theta = torch.zeros(budget.shape, dtype=torch.float64, requires_grad=True)
    sinks = torch.full(budget.shape, math.log(variant.num_sink_tokens), dtype=torch.float64, requires_grad=True)
    adam, order = torch.optim.Adam([theta, sinks]), allocator.order(probe.num_sequences)

    def current() -> tuple[Tensor, Tensor]:
        capacities = capacities_of(theta, budget)
        return capacities, torch.minimum(sinks.exp().clamp(min=1), capacities - 1)

    for step in range(allocator.steps):
        adam.param_groups[0]["lr"] = allocator.learning_rate * (1 - step / allocator.steps)
        adam.zero_grad()
        capacities, first = current()
        bias = SoftlyVisible(capacities - first, first, allocator.tau(step))
        probe.soft_loss(bias, sequence=order[step]).mean().backward()
        adam.step()
    with torch.no_grad():
        return current()


def together(probe: ModelProbe, budgets: dict[float, Budget], variant: Variant) -> dict[float, Tensor]:
    """The same shares for all retentions, which take turns."""
    allocator, turns = LearnedAllocator(**variant.options), list(budgets.values())
    theta = torch.zeros(turns[0].shape, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([theta])
    order = allocator.order(probe.num_sequences)
    for step in range(allocator.steps):
        adam.param_groups[0]["lr"] = allocator.learning_rate * (1 - step / allocator.steps)
        adam.zero_grad()
        kept = capacities_of(theta, turns[step % len(turns)]) - (probe.least_capacity - 1)
        probe.soft_loss(SoftCapacities(kept, allocator.tau(step)), sequence=order[step]).mean().backward()
        adam.step()
    return {retention: capacities_of(theta.detach(), budget) for retention, budget in budgets.items()}


def table(folder: Path) -> str:
    """Markdown: what is left of uniform's excess at each retention on each text, and the distance from the default."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    references, lines = found.pop("references"), []
    texts = list(references["full"])
    for level in references["uniform"]:
        lines += [f"| {float(level):.0%} kept | {' | '.join(texts)} | all | loss minus the default's | seconds |"]
        lines += ["|---" * (len(texts) + 4) + "|"]
        default = joined(found["default"]["losses"][level])
        for name, each in found.items():
            losses = each["losses"][level]
            cells = [share(losses[x], references["uniform"][level][x], references["full"][x]) for x in texts]
            cells += [share(joined(losses), joined(references["uniform"][level]), joined(references["full"]))]
            difference = paired_difference(torch.tensor(joined(losses)), torch.tensor(default))
            apart = "" if name == "default" else f"{difference.low:+.4f} to {difference.high:+.4f}"
            lines.append(f"| {name} | {' | '.join(cells)} | {apart} | {each['seconds']:.0f} |")
        lines.append("")
    return "\n".join(lines)


def joined(losses: dict[str, list[float]]) -> list[float]:
    return [loss for each in losses.values() for loss in each]


def share(losses: list[float], uniform: list[float], full: list[float]) -> str:
    found = excess_share(torch.tensor(losses), torch.tensor(uniform), torch.tensor(full))
    return "" if found is None else f"{found.mean:.3f} ({found.low:.3f} to {found.high:.3f})"


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--table", type=Path, help="folder: write its table beside it, and measure nothing")
    parser.add_argument("--out", type=Path, help="folder")
    parser.add_argument("--search", type=Path)
    parser.add_argument("--report", type=Path, nargs="*", default=[])
    parser.add_argument("--importance", type=Path)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=["references", *VARIANTS])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--retention", type=float, nargs="+", default=[0.3, 0.1], help="largest first")
    parser.add_argument("--limit", type=int, default=16, help="sequences of each text")
    options = parser.parse_args()
    if options.table:
        options.table.with_suffix(".md").write_text(table(options.table), encoding="utf-8")
        return
    options.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(options)
    for name in options.variants:
        path = options.out / f"{name}.json"
        if not path.exists():
            measured = bench.references() if name == "references" else bench.measure(VARIANTS[name])
            write_bytes(path, json.dumps(measured, indent=1).encode())
            print(name, "measured", flush=True)


if __name__ == "__main__":
    main()
