"""What `power` makes of sensitivity at another size, or of fewer sequences, without measuring again.

    python benchmarks/sensitivity_sizes.py --losses benchmarks/results/budgets_h100/power24.json.losses \
        --search books.txt --report other.txt wiki.txt --out benchmarks/results/sensitivity_sizes_cpu.jsonl

Importance comes from the losses that a search wrote down while it profiled 24 sequences: at 1/8 of the context and at
1/32, of all sequences and of two different thirds. The exponent is the best of three on three sequences of --search, on
all 24, for each size. Then every table on four sequences of each text of --report and of Python's language reference,
every token decoded under the budget. One line a table, {"what": ..., "losses": [...]}; prints what is left of uniform's
excess perplexity.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from kvpolicy_baselines.power import PowerAllocator
from sensitivity_noise import increases
from shared import command_line
from torch import Tensor

import kvpolicy
from kvpolicy import Budget, Importance, ModelSpec, TransformersProbe, apportion
from kvpolicy.measure.stats import excess_share, paired_difference
from kvpolicy.text.corpus import Corpus

CONTEXT, FLOOR_SHARE, EXPONENTS, RETENTIONS = 4096, 0.42, (0.25, 0.4, 0.6), (0.3, 0.1)
SIZES = {"1/8": 1, "1/32": 0}  # places in what was measured
SUBSETS = {"24": slice(0, 24), "8a": slice(0, 24, 3), "8b": slice(1, 24, 3)}
FOR_EXPONENTS = [2, 9, 16]


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        self.model, tokenizer = kvpolicy.load_model("smollm2-135m", device=options.device, dtype="bfloat16")
        self.spec, self.out = ModelSpec.from_config(self.model.config), options.out
        self.search = kvpolicy.read_corpus(tokenizer, options.search).sequences("search", 24, CONTEXT)[FOR_EXPONENTS]
        texts = [kvpolicy.read_corpus(tokenizer), *(kvpolicy.read_corpus(tokenizer, path) for path in options.report)]
        self.report = torch.cat([self.four(text) for text in texts])

    @staticmethod
    def four(text: Corpus) -> Tensor:
        """As far apart as the text allows, of at most 16."""
        found = text.sequences("whole", min(16, text.room("whole", CONTEXT)), CONTEXT)
        return found[torch.linspace(0, len(found) - 1, 4).round().long()]

    def budget(self, retention: float) -> Budget:
        return Budget(self.spec.total_entries(retention, CONTEXT), self.spec.table_shape, 5, CONTEXT)

    def power(self, importance: Tensor, retention: float, exponent: float) -> Tensor:
        budget, allocator = self.budget(retention), PowerAllocator(exponent=exponent, floor_share=FLOOR_SHARE)
        return apportion(allocator.shares(Importance(importance), budget), budget)

    def best_exponent(self, importance: Tensor, size: str, retention: float) -> float:
        tried = {}
        for each in EXPONENTS:
            table = self.power(importance, retention, each)
            tried[each] = float(self.losses(self.search, table, f"search 24@{size} {retention} {each}").mean())
        return min(tried, key=lambda each: tried[each])

    def losses(self, sequences: Tensor, table: Tensor, what: str) -> Tensor:
        found = TransformersProbe(self.model, sequences, num_sink_tokens=4).loss(table)
        with self.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"what": what, "losses": found.tolist()}) + "\n")
        return found


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--losses", type=Path, required=True)
    parser.add_argument("--search", type=Path, required=True)
    parser.add_argument("--report", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    bench = Bench(options)
    measured = increases(options.losses).unflatten(0, bench.spec.table_shape)  # [L, H, sizes, sequences]
    full = bench.losses(bench.report, torch.full(bench.spec.table_shape, CONTEXT), "full")
    for retention in RETENTIONS:
        table = apportion(torch.ones(bench.spec.table_shape), bench.budget(retention))
        uniform, first = bench.losses(bench.report, table, f"uniform {retention}"), None
        for size, place in SIZES.items():
            importance = {n: measured[:, :, place, s].mean(-1).clamp(min=0).float() for n, s in SUBSETS.items()}
            exponent = bench.best_exponent(importance["24"], size, retention)
            for name, own in importance.items():
                table = bench.power(own, retention, exponent)
                found = bench.losses(bench.report, table, f"{name}@{size} {retention} {exponent}")
                first = found if first is None else first
                left, apart = excess_share(found, uniform, full), paired_difference(found, first)
                print(retention, f"{name}@{size}", exponent, left, f"{apart.low:+.4f} to {apart.high:+.4f}", flush=True)


if __name__ == "__main__":
    main()
