"""Seconds per trial and peak memory of `tune` on the shapes of larger models, with random weights.

It needs a GPU of 40 GB or more:

    python benchmarks/tune_shapes.py --out shapes.csv
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from shapes import SHAPES, random_model
from shared import Notes, command_line, machine, write_csv

import kvpolicy
from kvpolicy import TuneSettings
from kvpolicy.text.corpus import Corpus


class Clock(Notes):
    """Seconds of each stage."""

    def __init__(self) -> None:
        self.stages: dict[str, float] = {}

    def begin(self, stage: str, total: int) -> None:
        self.name, self.begun = stage, time.perf_counter()

    def end(self) -> None:
        torch.cuda.synchronize()
        self.stages[self.name] = time.perf_counter() - self.begun


def measure(name: str, corpus: Corpus, context: int, trials: int) -> dict:
    model = random_model(name)
    weights = sum(p.nbytes for p in model.parameters())
    torch.cuda.reset_peak_memory_stats()
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        settings = TuneSettings(
            retentions=(0.3,), context_length=context, trials=trials, out=Path(folder) / "plan.json", choose_dtype=False
        )
        begin = time.perf_counter()
        kvpolicy.tune(model, corpus, settings, progress=clock)
        whole = time.perf_counter() - begin
    return {
        "shape": name,
        "context": context,
        "trials": trials,
        "sequences_a_trial": 4,
        "seconds_per_trial": round(clock.stages["search 30%"] / (trials + 1), 3),  # uniform's run is one more
        "seconds_in_all": round(whole, 1),
        "peak_GB": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        "weights_GB": round(weights / 1e9, 2),
        "dtype": "bfloat16",
        **machine("cuda", "torch", "transformers"),
    }


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--out", default="tune_shapes.csv")
    options = parser.parse_args()
    _, tokenizer = kvpolicy.load_model()
    corpus = kvpolicy.read_corpus(tokenizer)
    rows = []
    for name in SHAPES:
        rows.append(measure(name, corpus, options.context, options.trials))
        print(*rows[-1].values(), sep="\t", flush=True)
        torch.cuda.empty_cache()
    write_csv(options.out, rows)


if __name__ == "__main__":
    main()
