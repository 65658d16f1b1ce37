"""Seconds per trial and peak memory of `tune` on the shapes of larger models, with random weights.

It needs a GPU of 40 GB or more:

    python benchmarks/tune_shapes.py --out shapes.csv
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import time
from pathlib import Path

import torch
import transformers

import kvpolicy
from kvpolicy import TuneSettings
from kvpolicy.progress import Progress
from kvpolicy.text.corpus import Corpus

SHAPES = {
    "Llama-3-8B": (
        "Llama",
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192},
    ),
    "Qwen2.5-7B": (
        "Qwen2",
        {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
         "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768},
    ),
}  # fmt: skip


class Clock(Progress):
    """Seconds of each stage."""

    def __init__(self) -> None:
        self.stages: dict[str, float] = {}

    def note(self, message: str) -> None:
        print(message, flush=True)

    def begin(self, stage: str, total: int) -> None:
        self.name, self.begun = stage, time.perf_counter()

    def end(self) -> None:
        torch.cuda.synchronize()
        self.stages[self.name] = time.perf_counter() - self.begun


def random_model(family: str, sizes: dict) -> torch.nn.Module:
    config = getattr(transformers, f"{family}Config")(**sizes)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return getattr(transformers, f"{family}ForCausalLM")(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def measure(name: str, corpus: Corpus, context: int, trials: int) -> dict:
    model = random_model(*SHAPES[name])
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
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    with open(options.out, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
