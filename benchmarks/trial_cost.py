"""What a trial costs: one forward under per-head windows, over one causal-SDPA forward of the same model.

Both run the same tokens in the same dtype and compute logits for the same positions; they alternate, and the median
of the ratios counts.

    python benchmarks/trial_cost.py [--device cpu] [--context 2048] [--out results.csv]
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import time
from collections.abc import Callable

import torch
import transformers

import kvpolicy
from kvpolicy import Budget, TransformersProbe, apportion
from kvpolicy.integrations.transformers import cast_parameters

REPEATS = 5


def seconds(run: Callable[[], object], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def tables(probe: TransformersProbe, retention: float) -> dict[str, torch.Tensor]:
    """A uniform table and a ragged one (shares lognormal with sigma 1) of the same total."""
    spec, context = probe.spec, probe.context_length
    budget = Budget(spec.total_entries(retention, context), spec.table_shape, 5, context)
    ragged = torch.randn(spec.table_shape, generator=torch.Generator().manual_seed(0)).exp()
    return {"uniform": apportion(torch.ones(spec.table_shape), budget), "ragged": apportion(ragged, budget)}


def ratio(probe: TransformersProbe, table: torch.Tensor, device: str) -> tuple[float, float, float]:
    """(median ratio, median seconds of the trial, median seconds of the causal forward)."""

    def trial() -> None:
        list(probe.token_losses(table))

    def causal() -> None:
        with torch.no_grad():
            for row in probe.sequences.split(probe.batch_size):
                probe.losses_of(row.to(device))

    trial(), causal()
    pairs = [(seconds(trial, device), seconds(causal, device)) for _ in range(REPEATS)]
    trials, plains = zip(*pairs, strict=True)
    ratios = [a / b for a, b in pairs]
    return statistics.median(ratios), statistics.median(trials), statistics.median(plains)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--out")
    options = parser.parse_args()
    processor = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    name = processor if options.device == "cpu" else torch.cuda.get_device_name()
    model, tokenizer = kvpolicy.load_model(device=options.device)
    sequences = kvpolicy.read_corpus(tokenizer).sequences("search", options.sequences, options.context)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        cast_parameters(model, dtype)
        probe = TransformersProbe(model, sequences)
        for retention in (0.5, 0.3, 0.1):
            for shape, table in tables(probe, retention).items():
                middle, trial, causal = ratio(probe, table, options.device)
                rows.append(
                    {
                        "dtype": str(dtype).removeprefix("torch."),
                        "retention": retention,
                        "table": shape,
                        "ratio": round(middle, 3),
                        "trial_s": round(trial, 4),
                        "causal_s": round(causal, 4),
                        "context": options.context,
                        "sequences": options.sequences,
                        "repeats": REPEATS,
                        "device": name,
                        "torch": torch.__version__,
                        "transformers": transformers.__version__,
                    }
                )
                print(*rows[-1].values(), sep="\t", flush=True)
    if options.out:
        with open(options.out, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
