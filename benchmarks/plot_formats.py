"""Divergence over bytes, a line for each format: the picture of files of `formats_frontier.py` or `formats_study.py`.

    python benchmarks/plot_formats.py docs/images/formats.png benchmarks/results/formats_cpu.csv \
        benchmarks/results/formats_knapsack_cpu.csv
    python benchmarks/plot_formats.py docs/images/formats_h200.png benchmarks/results/formats_prompt_h200.csv \
        benchmarks/results/formats_window_h200.csv

Solid lines have learned capacities, dashed ones equal capacities; a point by itself is a method without a budget. Each
model and protocol has a panel of its own. A divergence of 0 has no place on a logarithmic axis.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from shared import command_line, read_csv

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NAMES = {"model": "16 bits", "kivi4": "KIVI, 4 bits", "kivi2": "KIVI, 2 bits", "think": "ThinK"}
COLORS = {
    "16 bits": "#333333", "int8": "#1f77b4", "int4": "#d62728", "KIVI, 4 bits": "#e8a33d", "KIVI, 2 bits": "#c9b458",
    "ThinK": "#7f7f7f", "knapsack": "#2ca02c", "KVSharer": "#9467bd",
    "16 bits, expected_attention": "#17a2a2", "16 bits, keydiff": "#b08968",
    "int4, expected_attention": "#ff8fa3", "int8, expected_attention": "#8fc1ee",
}  # fmt: skip
WHOLE = ("everything", "nothing evicted")
TITLES = {"prompt": "tokens behind a compressed prompt", "window": "every token decoded under the window rule"}
LEVELS = (0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)

Lines = dict[tuple[str, str], list[tuple[float, float]]]


def name_of(row: dict[str, str]) -> str:
    said, policy = row.get("format") or row["row"], row.get("policy", "").partition("(")[0]
    name = "KVSharer" if said.startswith("share") else NAMES.get(said, said)
    return name if policy in ("", "snapkv", "streaming") else f"{name}, {policy}"


def lines_of(rows: list[dict[str, str]]) -> Lines:
    """(bytes, divergence) by the format's name and by equal, learned, or nothing where there is no budget."""
    lines: Lines = defaultdict(list)
    whole: dict[str, tuple[float, float]] = {}
    for row in rows:
        name, point = name_of(row), (float(row["bytes"]), float(row["kl"]))
        capacities = row.get("capacities", "")
        if capacities in WHOLE:
            whole[name] = point
        elif point[1] > 0:
            lines[name, "learned" if "learned" in capacities else capacities].append(point)
    for (name, _), line in lines.items():
        line += [whole[name]] if whole.get(name, (0, 0))[1] > 0 else []
    return lines


def draw(axis: Axes, rows: list[dict[str, str]]) -> None:
    for (name, capacities), line in sorted(lines_of(rows).items()):
        label = f"{name}, {capacities}" if capacities else name
        style = {"learned": "-", "equal": "--"}.get(capacities, "-" if name == "knapsack" else "none")
        x, y = zip(*sorted(line), strict=True)
        axis.plot(x, y, linestyle=style, marker="o", markersize=4, color=COLORS[name], label=label)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks(LEVELS, [f"{100 * level:g} %" for level in LEVELS])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.set_xlabel("bytes, as a part of the full cache's")
    first = rows[0]
    said = f"{first['model']}, {first['prompt']} tokens, n = {first['n']}, {first['device'].split(',')[0]}"
    axis.set_title("\n".join(x for x in (TITLES.get(first.get("protocol", "")), said) if x), fontsize=10)
    axis.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.13), frameon=False)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("image", type=Path)
    parser.add_argument(
        "rows", type=Path, nargs="+", help="CSV files, of the same prompts where of the same model and protocol"
    )
    options = parser.parse_args()
    panels: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
    for path in options.rows:
        for row in read_csv(path):
            panels[row["model"], row.get("protocol", "")].append(row)
    size = 7.5 if len(panels) == 1 else 6 * len(panels)
    figure, axes = plt.subplots(1, len(panels), figsize=(size, 6), layout="constrained", squeeze=False)
    for axis, rows in zip(axes[0], panels.values(), strict=True):
        draw(axis, rows)
    axes[0][0].set_ylabel("divergence from the full cache, nats a token")
    figure.savefig(options.image, dpi=130)


if __name__ == "__main__":
    main()
