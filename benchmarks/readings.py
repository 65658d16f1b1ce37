"""Which reading of BaKlaVa's heuristic carries a gain: head input, group rule, and across the model or inside a layer.

For each reading a grid over the head exponent and the floor, layer importance off; the point that is best on the search
text is reported on other texts: excess perplexity over the full cache's, as a share of uniform's.

    python benchmarks/readings.py --search BOOK --report OTHER ANOTHER --context 4096 --out readings.csv
"""

from __future__ import annotations

import itertools

import torch
from shared import command_line, machine, write_csv

import kvpolicy
from kvpolicy import Budget, Importance, TransformersProbe, apportion, registry

READINGS = [
    {"head_input": "value"},
    {"head_input": "value", "group": "max"},
    {"head_input": "slice"},
    {"head_input": "proj"},
    {"head_input": "proj_residual"},
]
EXPONENTS = (-3.0, -1.5, -0.5, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FLOORS = (0.05, 0.25, 0.5)


class Scored:
    """A probe that answers with excess perplexity as a share of uniform's."""

    def __init__(self, probe: TransformersProbe) -> None:
        self.probe = probe
        self.full = self.perplexity(torch.full(probe.spec.table_shape, probe.context_length))
        self.uniform: dict[int, float] = {}

    def perplexity(self, table: torch.Tensor) -> float:
        return float(self.probe.loss(table).mean().exp())

    def share(self, shares: torch.Tensor, budget: Budget) -> float:
        if budget.total not in self.uniform:
            self.uniform[budget.total] = self.perplexity(apportion(torch.ones(budget.shape), budget))
        return (self.perplexity(apportion(shares, budget)) - self.full) / (self.uniform[budget.total] - self.full)


def best_point(importance: Importance, budget: Budget, search: Scored) -> tuple[float, dict, torch.Tensor]:
    """(share on the search text, parameters, shares) of the best point of the grid."""
    points = []
    for exponent, floor in itertools.product(EXPONENTS, FLOORS):
        params = {"layer_exponent": 0.0, "head_exponent": exponent, "floor_share": floor}
        shares = registry.create("allocator", "baklava", params).shares(importance, budget)
        points.append((search.share(shares, budget), params, shares))
    return min(points, key=lambda point: point[0])


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--search", required=True)
    parser.add_argument("--report", nargs="+", required=True)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--retention", type=float, nargs="+", default=[0.3, 0.1, 0.05])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", default="readings.csv")
    options = parser.parse_args()
    model, tokenizer = kvpolicy.load_model(device=options.device)
    corpus = kvpolicy.read_corpus(tokenizer, options.search)
    context = options.context
    profiled = TransformersProbe(model, corpus.sequences("search", 6, context), corpus.prompts(context))
    search, reported = Scored(profiled), {}
    for text in options.report:
        other = kvpolicy.read_corpus(tokenizer, text)
        count = min(8, other.room("heldout", context))
        reported[other.name] = Scored(TransformersProbe(model, other.sequences("heldout", count, context)))
    spec, rows = profiled.spec, []
    for reading, scope in itertools.product(READINGS, ("model", "layer")):
        measured = registry.create("estimator", "cosine", reading).estimate(profiled).per_head
        ranked = measured if scope == "model" else measured / measured.mean(1, keepdim=True).clamp(min=1e-6)
        for retention in options.retention:
            budget = Budget(spec.total_entries(retention, context), spec.table_shape, 5, context)
            found, params, shares = best_point(Importance(ranked), budget, search)
            for name, scored in reported.items():
                rows.append(
                    {
                        **{"head_input": "value", "group": "mean"} | reading,
                        "compared_across": scope,
                        "retention": retention,
                        "head_exponent": params["head_exponent"],
                        "floor_share": params["floor_share"],
                        "on_search": round(found, 3),
                        "text": name,
                        "of_uniforms_excess": round(scored.share(shares, budget), 3),
                        "n": len(scored.probe.sequences),
                        "context": context,
                        "searched_on": corpus.name,
                        **machine(options.device, "torch", "transformers"),
                    }
                )
                print(*rows[-1].values(), sep="\t", flush=True)
    write_csv(options.out, rows)


if __name__ == "__main__":
    main()
