"""What a search gains, and whether the ranking of the heads carries it.

Searches on one text (`kvpolicy tune` itself) and reports on others: perplexity above the full cache's, and that excess
as a share of uniform's, with a paired-bootstrap interval over sequences. Controls: the plan's shares permuted at
random (the same budgets on the wrong heads), and layer importance alone (SqueezeAttention's signal).

    python benchmarks/tune_quality.py --search BOOK --report OTHER ... --context 4096 --trials 40 --out results.csv
"""

from __future__ import annotations

from pathlib import Path

import torch
from shared import Notes, command_line, machine, write_csv

import kvpolicy
from kvpolicy import Budget, BudgetPlan, TransformersProbe, TuneSettings, apportion, registry
from kvpolicy.measure.evaluation import measured_bytes
from kvpolicy.text.corpus import Corpus

PERMUTATIONS = 5


def shares_of(plan: BudgetPlan, level: int) -> dict[str, torch.Tensor]:
    """Maps names to shares `[L, H]` of everything that is compared at one level."""
    assert plan.importance is not None
    shape = plan.model.table_shape
    found = plan.levels[level].shares
    by_layer = {"layer_exponent": 1.0, "head_exponent": 0.0, "floor_share": 0.0}
    layers = registry.create("allocator", "baklava", by_layer).shares(plan.importance, Budget(1, shape, 0, 1))
    compared = {"uniform": torch.ones(shape), "layer cosine": layers, "head cosine, searched": found}
    for seed in range(PERMUTATIONS):
        order = torch.randperm(found.numel(), generator=torch.Generator().manual_seed(seed))
        compared[f"searched, permuted {seed}"] = found.flatten()[order].reshape(shape)
    return compared


def excess_ratio(loss: torch.Tensor, uniform: torch.Tensor, full: torch.Tensor) -> tuple[float, float, float]:
    """(ratio, low, high): excess perplexity over uniform's, 95 % paired bootstrap over sequences."""
    picks = torch.randint(len(loss), (10_000, len(loss)), generator=torch.Generator().manual_seed(0))
    ours, theirs, best = (x[picks].mean(1).exp() for x in (loss, uniform, full))
    ratios = ((ours - best) / (theirs - best)).sort().values
    point = (loss.mean().exp() - full.mean().exp()) / (uniform.mean().exp() - full.mean().exp())
    return float(point), float(ratios[249]), float(ratios[9749])


def report(model: object, corpus: Corpus, plan: BudgetPlan, context: int, limit: int) -> list[dict]:
    count = min(limit, corpus.room("heldout", context))
    probe = TransformersProbe(model, corpus.sequences("heldout", count, context))
    full = probe.full_loss()
    rows = []
    for index, level in enumerate(plan.levels):
        budget = Budget(probe.spec.total_entries(level.retention, context), probe.spec.table_shape, 5, context)
        losses, kept = {}, {}
        for name, shares in shares_of(plan, index).items():
            table = apportion(shares, budget)
            losses[name], kept[name] = probe.loss(table), measured_bytes(probe, table).bytes
        for name, loss in losses.items():
            ratio, low, high = excess_ratio(loss, losses["uniform"], full)
            rows.append(
                {
                    "text": corpus.name,
                    "retention": level.retention,
                    "method": name,
                    "perplexity": round(float(loss.mean().exp()), 4),
                    "full_perplexity": round(float(full.mean().exp()), 4),
                    "excess": round(float(loss.mean().exp() - full.mean().exp()), 4),
                    "of_uniforms_excess": round(ratio, 3),
                    "low": round(low, 3),
                    "high": round(high, 3),
                    "bytes": kept[name],
                    "n": count,
                    "context": context,
                }
            )
            print(*rows[-1].values(), sep="\t", flush=True)
    return rows


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--search", help="text to search on; default: Python's language reference")
    parser.add_argument("--report", nargs="*", default=[], help="texts to report on")
    parser.add_argument("--retention", type=float, nargs="+", default=[0.5, 0.3, 0.1, 0.05])
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--limit", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--plan", default="tune_quality_plan.json")
    parser.add_argument("--out", default="tune_quality.csv")
    options = parser.parse_args()
    model, tokenizer = kvpolicy.load_model(options.model, device=options.device, dtype=options.dtype)
    settings = TuneSettings(
        retentions=tuple(options.retention),
        context_length=options.context,
        trials=options.trials,
        seed=options.seed,
        out=Path(options.plan),
        choose_dtype=False,
    )
    corpus = kvpolicy.read_corpus(tokenizer, options.search)
    plan = kvpolicy.tune(model, corpus, settings, model_id=options.model, progress=Notes())
    kvpolicy.save_plan(plan, options.plan)
    common = {
        "searched_on": corpus.name,
        "trials": options.trials,
        "seed": options.seed,
        "dtype": options.dtype,
        "model": options.model,
        **machine(options.device, "torch", "transformers"),
    }
    rows = []
    for text in options.report or [None]:
        reported = kvpolicy.read_corpus(tokenizer, text)
        rows += [row | common for row in report(model, reported, plan, options.context, options.limit)]
    write_csv(options.out, rows)


if __name__ == "__main__":
    main()
