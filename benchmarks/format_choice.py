r"""A format for each layer by Fisher curves, beside one format for all layers, at equal bytes.

    python benchmarks/format_choice.py --text test_25830.txt test_26183.txt wiki.test.raw --plan snapkv_learned.json \
        --out benchmarks/results/format_choice_cpu.csv

One backward pass of each calibration prompt (CPython's own reference, unless `--calibration` names a text) gives the
curves of int8, int4 and the model's dtype behind a prompt that the policy compresses. At each level the closed form
(`choose_formats`) spends the same bytes over all three, `auto`, and over each alone. Capacities are those that it
finds, then those of the plan, in its proportions, and where layers are int4 those of `power`. Every row is measured
on the calibration prompts and on other texts: perplexity, and the divergence from the full cache, KL(full || row), over
the exact tokens behind the prompt. Bytes are every tensor of one cache behind its prompt, over the keys and values of
the whole prompt. Rows are written as they come.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from formats_frontier import Study
from shared import command_line, machine, write_csv
from torch import Tensor

import kvpolicy
from kvpolicy import BudgetError, Importance, PromptProbe, apportion
from kvpolicy.budget.entry_format import OF_A_TOKEN, Format, least_entries, named, of_layers
from kvpolicy.budget.format_choice import FormatChoice, FormatCurves, choose_formats
from kvpolicy.cache.size import block_nbytes, entry_nbytes
from kvpolicy.cache.weight import byte_budget, plan_retention
from kvpolicy.comparison.methods import Method, read_asked
from kvpolicy.measure.stats import mean_interval
from kvpolicy.model.spec import Budget, ModelSpec
from kvpolicy.plugins import plugin_call
from kvpolicy.plugins.registry import registry
from kvpolicy.tuning.auto_formats import EveryFormat


class Bytes:
    """How a level's bytes are spent, by the curves of one calibration or by a plan's capacities."""

    def __init__(
        self, importance: Importance, spec: ModelSpec, method: Method, prompt: int, dtype: torch.dtype
    ) -> None:
        self.importance, self.spec, self.method, self.prompt, self.dtype = importance, spec, method, prompt, dtype
        assert importance.format_curves is not None
        self.curves = {}
        for name, losses in importance.format_curves.items():
            own, policy = named(name), method.policy
            cost = entry_nbytes(spec, dtype, scored=True, entry_format=own)
            fixed = block_nbytes(spec, dtype.itemsize, policy, own) // spec.num_budgeted_layers
            self.curves[name] = FormatCurves(losses, cost, fixed, least_entries(policy, own))

    def budget(self, level: float, entry_format: Format) -> Budget:
        """Raises `BudgetError` where the fewest entries do not go into the bytes."""
        policy = self.method.policy
        return byte_budget(level, self.spec, self.prompt, self.dtype, policy, entry_format, scored=True)

    def choice(self, names: tuple[str, ...], level: float) -> FormatChoice:
        points = self.importance.curve_capacities
        assert points is not None
        curves, total = {name: self.curves[name] for name in names}, self.budget(level, None).total
        return choose_formats(curves, points, total, self.importance.together)

    def tables(self, choice: FormatChoice, level: float, plan: kvpolicy.BudgetPlan | None) -> dict[str, Tensor]:
        """Capacities by what says them, all of them as many entries as go into the bytes."""
        own = of_layers([named(name) for name in choice.formats])
        budget = self.budget(level, own)
        tables = {"fisher": apportion(choice.capacities.double(), budget)}
        if plan is not None:
            kept = plan_retention(plan, self.prompt, lambda _: budget, lambda _: own)
            tables["learned"] = apportion(plan.shares_at(kept), budget)
        if "int4" in choice.formats:
            allocator = registry.create("allocator", "power")
            tables["power"] = apportion(plugin_call.shares(allocator, self.importance, budget), budget)
        return tables


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--calibration", type=Path, help="left out: CPython's own reference")
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--plan", type=Path, help="whose capacities are used besides those of the curves")
    parser.add_argument("--policy", default="snapkv(num_sink_tokens=4)")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--behind", type=int, default=256)
    parser.add_argument("--sequences", type=int, default=3, help="of each text")
    parser.add_argument("--calibrated", type=int, default=4, help="sequences of the calibration text")
    parser.add_argument("--bytes", type=float, nargs="+", default=[0.15, 0.1], dest="levels")
    options = parser.parse_args()
    model, tokenizer = kvpolicy.load_model(options.model, dtype=options.dtype, device=options.device)
    length = options.prompt + options.behind
    (method,) = read_asked([options.policy])
    plan = None if options.plan is None else kvpolicy.load_plan(options.plan)
    search = kvpolicy.read_corpus(tokenizer, options.calibration).sequences("whole", options.calibrated, length)
    probe = PromptProbe(model, search, policy=method.policy, prefill_length=options.prompt)
    begun = time.perf_counter()
    importance = registry.create("estimator", "fisher").estimate(EveryFormat(probe))
    calibration = time.perf_counter() - begun
    print(f"curves of {', '.join(OF_A_TOKEN)}: {calibration:.0f} s", flush=True)
    spent = Bytes(importance, probe.spec, method, options.prompt, model.dtype)
    corpora = [kvpolicy.read_corpus(tokenizer, path) for path in options.text]
    sequences = torch.cat([search, *(corpus.sequences("whole", options.sequences, length) for corpus in corpora)])
    study = Study(model, sequences.to(model.device), options.prompt)
    study.measured(method, torch.full(probe.spec.table_shape, options.prompt), {})  # the full cache's logits
    dense = probe.spec.total_entries(1.0, options.prompt) * probe.spec.entry_bytes(model.dtype.itemsize)
    lines: list[dict[str, object]] = []
    for names in (("int4",), tuple(OF_A_TOKEN), ("int8",), ("model",)):
        for level in options.levels:
            try:
                choice = spent.choice(names, level)
                tables = spent.tables(choice, level, plan)
            except BudgetError as error:
                print(f"{names} at {level:g}: {error}", flush=True)
                continue
            own, layers = of_layers([named(name) for name in choice.formats]), Counter(choice.formats)
            for capacities, table in tables.items():
                begun = time.perf_counter()
                losses, divergences, nbytes = study.measured(replace(method, entry_format=own), table, {})
                searched, kl = divergences[: len(search)], divergences[len(search) :]
                low, high = mean_interval(torch.tensor(kl))
                lines.append(
                    {"formats": names[0] if len(names) == 1 else "auto", "capacities": capacities, "level": level,
                     "bytes": round(nbytes / dense, 4), **{f"{name}_layers": layers[name] for name in OF_A_TOKEN},
                     "entries": round(int(table.sum()) / probe.spec.total_entries(1.0, options.prompt), 4),
                     "predicted": round(choice.loss, 5), "search_kl": round(sum(searched) / len(searched), 5),
                     "search_loss": round(sum(losses[: len(search)]) / len(search), 5),
                     "perplexity": round(float(torch.tensor(losses[len(search) :]).mean().exp()), 3),
                     "kl": round(sum(kl) / len(kl), 5), "kl_low": round(low, 5), "kl_high": round(high, 5),
                     "n": len(kl), "prompt": options.prompt, "scored": options.behind,
                     "model": Path(options.model).name, "dtype": options.dtype, "policy": options.policy,
                     "calibration": f"{options.calibration.stem if options.calibration else 'python'} x {len(search)}",
                     "calibration_seconds": round(calibration), "texts": " ".join(path.stem for path in options.text),
                     "seconds": round(time.perf_counter() - begun), **machine(options.device, "torch", "transformers"),
                     "each_kl": " ".join(f"{x:.5f}" for x in kl),
                     "layers": " ".join(name[-1] for name in choice.formats)}
                )  # fmt: skip
                print(*list(lines[-1].values())[:15], sep="\t", flush=True)
                write_csv(options.out, lines)


if __name__ == "__main__":
    main()
