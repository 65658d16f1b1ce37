"""The picture of docs/results.md on budgets that were learned on answers, from what retrieval_budgets.py found.

    python benchmarks/plot_retrieval.py benchmarks/results/retrieval_h100 docs/images

Writes retrieval.png: the part of the answers that is found, with 95 % bootstrap intervals over the prompts.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
from retrieval_budgets import TASKS
from shared import command_line

from kvpolicy.comparison.results_file import Comparison, load_comparison
from kvpolicy.measure.stats import mean_interval

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

POLICIES = ("snapkv", "expected_attention")
BUDGETS = {  # colour, name
    "{}/uniform": ("0.65", "uniform"),
    "{}/adakv": ("#e08e45", "adakv"),
    "{}.json": ("#1b6ca8", "learned on answers"),
    "{}.json shuffled": ("#c9d9e8", "learned, for other heads at random"),
}


def draw(axis: Axes, found: Comparison) -> None:
    groups = [(policy, level) for policy in POLICIES for level in found.levels]
    full = 1 - found.at("full", 1.0).values().mean()
    axis.axhline(full, color="0.4", linewidth=1, linestyle=":")
    axis.annotate("full cache ", (1, full), xycoords=("axes fraction", "data"), fontsize=8, ha="right", va="bottom")
    for index, (method, (colour, said)) in enumerate(BUDGETS.items()):
        for place, (policy, level) in enumerate(groups):
            hits = 1 - found.at(method.format(policy), level).values()
            x = place + 0.2 * (index - 1.5)
            axis.bar(x, hits.mean(), 0.18, color=colour, label=None if place else said)
            axis.plot([x, x], mean_interval(hits), color="black", linewidth=1)
    axis.set_xticks(range(len(groups)), [f"{policy}\n{level:.0%} kept" for policy, level in groups], fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("folder", type=Path, help="of retrieval_budgets.py")
    parser.add_argument("images", type=Path, help="folder")
    options = parser.parse_args()
    folder, images = options.folder, options.images
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", sharey=True)
    for axis, task in zip(axes, TASKS, strict=True):
        found = load_comparison(folder / f"{task}.json")
        draw(axis, found)
        axis.set_title(f"{task}, {len(found.at('full', 1.0).losses)} prompts of 4096 tokens", fontsize=10)
    axes[0].set(ylabel="answers found", ylim=(0, 1.1))
    axes[1].legend(fontsize=8, frameon=False, loc="upper left")
    figure.savefig(images / "retrieval.png", dpi=130)


if __name__ == "__main__":
    main()
