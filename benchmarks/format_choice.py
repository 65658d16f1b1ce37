r"""A format for each layer by Fisher curves, beside one format for all layers, at equal bytes.

    python benchmarks/format_choice.py --calibration pg19_a.txt --text pg19_b.txt wiki.txt \
        --out benchmarks/results/format_choice_cpu.csv

One backward pass of each calibration prompt gives the curves of int8, int4 and the model's dtype behind a prompt that
the policy compresses. At each level the closed form (`choose_formats`) spends the same bytes over all three, and over
each alone; the rest of the bytes goes along the capacities it found. What comes out is measured on other texts:
perplexity, and the divergence from the full cache, KL(full || row), over the exact tokens behind the prompt. The model
runs in `--dtype`; bytes are counted as of 16-bit numbers, with positions, scores and the exact block, over those of the
keys and values of the whole prompt. Rows are written as they come.
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
from kvpolicy import Budget, Importance, PromptProbe, apportion
from kvpolicy.budget.entry_format import OF_A_TOKEN, least_entries, named, of_layers
from kvpolicy.budget.format_choice import FormatChoice, FormatCurves, choose_formats
from kvpolicy.cache.size import block_nbytes, entry_costs, entry_nbytes
from kvpolicy.comparison.methods import read_asked
from kvpolicy.measure.stats import mean_interval
from kvpolicy.model.spec import ModelSpec
from kvpolicy.plugins.registry import registry
from kvpolicy.plugins.roles import EvictionPolicy
from kvpolicy.tuning.auto_formats import EveryFormat

DTYPE = torch.bfloat16  # of the bytes


def curves_of(importance: Importance, spec: ModelSpec, policy: EvictionPolicy) -> dict[str, FormatCurves]:
    assert importance.format_curves is not None
    curves = {}
    for name, losses in importance.format_curves.items():
        own = named(name)
        cost = entry_nbytes(spec, DTYPE, scored=True, entry_format=own)
        fixed = block_nbytes(spec, DTYPE.itemsize, policy, own) // spec.num_budgeted_layers
        curves[name] = FormatCurves(losses, cost, fixed, least_entries(policy, own))
    return curves


def table_of(choice: FormatChoice, spec: ModelSpec, policy: EvictionPolicy, total: int, prompt: int) -> Tensor:
    """All of the bytes, in proportion to the capacities that were found."""
    own = of_layers([named(name) for name in choice.formats])
    cost = entry_costs(spec, DTYPE, scored=True, entry_format=own)
    left = min(total - block_nbytes(spec, DTYPE.itemsize, policy, own), int(cost.sum()) * prompt)
    floor = min(least_entries(policy, own), prompt)
    return apportion(choice.capacities.double(), Budget(left, spec.table_shape, floor, prompt, cost))


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--policy", default="snapkv(num_sink_tokens=4)")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--behind", type=int, default=512)
    parser.add_argument("--sequences", type=int, default=2, help="of each text")
    parser.add_argument("--calibrated", type=int, default=3, help="sequences of the calibration text")
    parser.add_argument("--bytes", type=float, nargs="+", default=[0.3, 0.15, 0.1, 0.075], dest="levels")
    options = parser.parse_args()
    model, tokenizer = kvpolicy.load_model(options.model, dtype=options.dtype, device=options.device)
    length = options.prompt + options.behind
    (method,) = read_asked([options.policy])
    corpus = kvpolicy.read_corpus(tokenizer, options.calibration)
    sequences = corpus.sequences("whole", options.calibrated, length)
    probe = PromptProbe(model, sequences, policy=method.policy, prefill_length=options.prompt)
    begun = time.perf_counter()
    importance = registry.create("estimator", "fisher").estimate(EveryFormat(probe))
    calibration = time.perf_counter() - begun
    print(f"curves of {', '.join(OF_A_TOKEN)}: {calibration:.0f} s", flush=True)
    spec, points = probe.spec, importance.curve_capacities
    assert points is not None
    curves = curves_of(importance, spec, method.policy)
    corpora = [kvpolicy.read_corpus(tokenizer, path) for path in options.text]
    held = torch.cat([corpus.sequences("whole", options.sequences, length) for corpus in corpora])
    study = Study(model, held.to(model.device), options.prompt)
    study.measured(method, torch.full(spec.table_shape, options.prompt), {})  # the full cache's logits
    dense = spec.total_entries(1.0, options.prompt) * spec.entry_bytes(DTYPE.itemsize)
    lines: list[dict[str, object]] = []
    for names in (("int4",), tuple(curves), ("int8",), ("model",)):
        for level in options.levels:
            total = round(level * dense)
            try:
                choice = choose_formats({name: curves[name] for name in names}, points, total)
            except kvpolicy.BudgetError as error:
                print(f"{names} at {level:g}: {error}", flush=True)
                continue
            own = of_layers([named(name) for name in choice.formats])
            table, begun = table_of(choice, spec, method.policy, total, options.prompt), time.perf_counter()
            losses, divergences, _ = study.measured(replace(method, entry_format=own), table, {})
            cost = entry_costs(spec, DTYPE, scored=True, entry_format=own)
            spent = int((cost * table).sum()) + block_nbytes(spec, DTYPE.itemsize, method.policy, own)
            low, high = mean_interval(torch.tensor(divergences))
            layers = Counter(choice.formats)
            lines.append(
                {"formats": names[0] if len(names) == 1 else "auto", "level": level, "bytes": round(spent / dense, 4),
                 **{f"{name}_layers": layers[name] for name in OF_A_TOKEN},
                 "entries": round(int(table.sum()) / spec.total_entries(1.0, options.prompt), 4),
                 "predicted": round(choice.loss, 5),
                 "perplexity": round(float(torch.tensor(losses).mean().exp()), 3),
                 "kl": round(sum(divergences) / len(divergences), 5), "kl_low": round(low, 5),
                 "kl_high": round(high, 5), "n": len(losses), "prompt": options.prompt, "scored": options.behind,
                 "model": options.model, "dtype": options.dtype, "policy": options.policy,
                 "calibration": f"{options.calibration.stem} x {options.calibrated}",
                 "calibration_seconds": round(calibration), "texts": " ".join(path.stem for path in options.text),
                 "seconds": round(time.perf_counter() - begun), **machine(options.device, "torch", "transformers")}
            )  # fmt: skip
            print(*list(lines[-1].values())[:12], sep="\t", flush=True)
            write_csv(options.out, lines)


if __name__ == "__main__":
    main()
