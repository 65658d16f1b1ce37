"""What a trial costs: one forward under per-head windows, over one causal-SDPA forward of the same model.

Both run the same tokens in the same dtype and compute logits for the same positions; they alternate, and the median
of the ratios counts.

    python benchmarks/trial_cost.py [--device cpu] [--context 2048] [--out results.csv]
"""

from __future__ import annotations

import statistics

import torch
from shared import command_line, machine, table_of, timed, write_csv

import kvpolicy
from kvpolicy import TransformersProbe
from kvpolicy.integrations.transformers import cast_parameters

REPEATS = 5


def ratio(probe: TransformersProbe, table: torch.Tensor, device: str) -> tuple[float, float, float]:
    """(median ratio, median seconds of the trial, median seconds of the causal forward)."""

    def trial() -> None:
        list(probe.token_losses(table))

    def causal() -> None:
        with torch.no_grad():
            for row in probe.sequences.split(probe.batch_size):
                probe.losses_of(row.to(device))

    trial(), causal()
    pairs = [(timed(trial)[0], timed(causal)[0]) for _ in range(REPEATS)]
    trials, plains = zip(*pairs, strict=True)
    ratios = [a / b for a, b in pairs]
    return statistics.median(ratios), statistics.median(trials), statistics.median(plains)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--out")
    options = parser.parse_args()
    model, tokenizer = kvpolicy.load_model(device=options.device)
    sequences = kvpolicy.read_corpus(tokenizer).sequences("search", options.sequences, options.context)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        cast_parameters(model, dtype)
        probe = TransformersProbe(model, sequences)
        for retention in (0.5, 0.3, 0.1):
            for shape in ("uniform", "ragged"):
                table = table_of(probe.spec, retention, probe.context_length, ragged=shape == "ragged")
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
                        **machine(options.device, "torch", "transformers"),
                    }
                )
                print(*rows[-1].values(), sep="\t", flush=True)
    if options.out:
        write_csv(options.out, rows)


if __name__ == "__main__":
    main()
