"""The picture of docs/explanation/vllm-costs.md, from the rows of serve.py.

python plugins/vllm/benchmarks/plot_serve.py plugins/vllm/benchmarks/results/serve_h200.csv docs/images/vllm.png
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NAMES = {"dense": "dense", "fp8": "dense, fp8", "slab-20": "slab, 20 %", "blocks-20": "blocks, 20 %"}
COLORS = {"dense": "0.55", "dense, fp8": "0.75", "slab, 20 %": "tab:blue", "blocks, 20 %": "tab:cyan"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("image", type=Path)
    options = parser.parse_args()
    with options.rows.open(newline="") as file:
        rows = {(row["job"], row["run"]): row for row in csv.DictReader(file)}
    figure, axes = plt.subplots(1, 3, figsize=(9.5, 3), layout="constrained", width_ratios=(4, 4, 3))
    panels = (
        ("fits", "concurrency", "requests of 32k that fit"),
        ("batch", "tokens_a_second", "tokens a second"),
    )
    for axis, (run, column, title) in zip(axes, panels, strict=False):
        found = {name: float(rows[job, run][column]) for job, name in NAMES.items()}
        bars = axis.bar(found.keys(), found.values(), color=[COLORS[name] for name in found])
        axis.bar_label(bars, fmt="%.0f", fontsize=8)
        axis.set_title(title, fontsize=9)
    for place, (system, jobs) in enumerate(
        {"dense": ("dense", "dense-128k"), "slab, 30 %": ("slab-30", "slab-30-128k")}.items()
    ):
        found = [float(rows[job, "single"]["ms_a_token"]) for job in jobs]
        bars = axes[2].bar(
            [at + 0.4 * place for at in range(2)], found, 0.38, label=system, color=("0.55", "tab:blue")[place]
        )
        axes[2].bar_label(bars, fmt="%.2f", fontsize=8)
    axes[2].set_xticks([0.2, 1.2], ["32k", "128k"])
    axes[2].set_title("one request: ms a token", fontsize=9)
    axes[2].legend(fontsize=7, frameon=False, loc="upper left")
    axes[2].margins(y=0.2)
    for axis in axes:
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(options.image, dpi=130)


if __name__ == "__main__":
    main()
