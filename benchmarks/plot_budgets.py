"""The table and the picture of docs/results.md on measured and learned budgets, from what measured_budgets.py found.

    python benchmarks/plot_budgets.py benchmarks/results/budgets_h100 docs/images

Prints Markdown: which part of uniform's excess perplexity each plan leaves, for each text and in the mean of the texts,
with 95 % bootstrap intervals (sequences drawn again within each text, 10 000 times). Writes budgets.png.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from kvpolicy.compare.document import Comparison, load_comparison

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PLANS = {  # colour, name
    "learned.json": ("#1b6ca8", "learned"),
    "power.json": ("#e08e45", "sensitivity, power"),
    "baklava.json": ("#8e7cc3", "cosine, baklava"),
}
CONTROLS = {name.replace(".json", ".json shuffled"): ("", f"{said}, shuffled") for name, (_, said) in PLANS.items()}
RESAMPLES = 10_000


def share(found: Comparison, method: str, level: float, seed: int) -> tuple[float, Tensor]:
    """What is left of uniform's excess perplexity, and the same of each resample."""
    full = found.at("full", 1.0)
    excess = [found.at(name, level).values() - full.values() for name in (method, "streaming/uniform")]
    count = len(full.values())
    picks = torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(seed))
    ours, theirs = (torch.expm1(each[picks].mean(1)) for each in excess)
    return math.expm1(excess[0].mean()) / math.expm1(excess[1].mean()), ours / theirs


def bounds(resamples: Tensor) -> tuple[float, float]:
    low, high = torch.quantile(resamples, torch.tensor([0.025, 0.975], dtype=resamples.dtype)).tolist()
    return low, high


def main() -> None:
    folder, images = Path(sys.argv[1]), Path(sys.argv[2])
    texts = {path.stem.removeprefix("window_"): load_comparison(path) for path in sorted(folder.glob("window_*.json"))}
    levels = next(iter(texts.values())).levels
    counts = [f"{name} (n = {len(found.at('full', 1.0).losses)})" for name, found in texts.items()]
    print(f"| kept | method | {' | '.join(counts)} | mean of the texts |\n{'|---' * (len(texts) + 3)}|")
    figure, axis = plt.subplots(figsize=(7.5, 4), layout="constrained")
    axis.axhline(1, color="0.5", linewidth=1, linestyle=":")
    axis.annotate(" uniform", (1, 1), xycoords=("axes fraction", "data"), fontsize=8, va="center")
    for place, level in enumerate(levels):
        for index, (method, (colour, said)) in enumerate({**PLANS, **CONTROLS}.items()):
            found = [share(each, method, level, seed) for seed, each in enumerate(texts.values())]
            mean, (low, high) = (
                sum(x for x, _ in found) / len(found),
                bounds(torch.stack([x for _, x in found]).mean(0)),
            )
            cells = [f"{x:.2f} ({a:.2f} to {b:.2f})" for x, (a, b) in ((x, bounds(draws)) for x, draws in found)]
            print(f"| {level:.0%} | {said} | {' | '.join(cells)} | **{mean:.3f}** ({low:.3f} to {high:.3f}) |")
            if colour:
                x = place + 0.25 * (index - 1)
                axis.bar(x, mean, 0.22, color=colour, label=said if not place else None)
                axis.errorbar(x, mean, [[mean - low], [high - mean]], color="black", linewidth=1, capsize=2)
                axis.plot(
                    [x] * len(found), [each for each, _ in found], "o", color="white", markeredgecolor="black", ms=4
                )
    axis.set_xticks(range(len(levels)), [f"{level:.0%} kept" for level in levels])
    axis.set_ylabel("perplexity added, as a part of\nwhat uniform budgets add")
    axis.set_title("SmolLM2-135M, 4096 tokens: means of four texts, 95 % intervals; circles are the texts", fontsize=9)
    axis.set_ylim(0, 1.25)
    axis.legend(fontsize=8, frameon=False, ncols=3, loc="upper left")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(images / "budgets.png", dpi=130)


if __name__ == "__main__":
    main()
