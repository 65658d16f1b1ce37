"""The picture of docs/benchmarks.md, from the CSV of decode_graph.py.

    python benchmarks/plot_decode_graph.py benchmarks/results/decode_graph_h200 docs/images

writes decode_graph.png: milliseconds a token with their floor, and memory, by context, under `streaming` and growing
budgets; tokens per second of the largest batches.
"""

from __future__ import annotations

from typing import Any

import matplotlib
from shared import command_line, read_csv

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Row = dict[str, str]
BARS = {  # (cache, kept): colour, name
    ("DynamicCache, eager", "1.0"): ("#b0b0b0", "DynamicCache, eager"),
    ("DynamicCache, eager, flash", "1.0"): ("#8e7cc3", "DynamicCache, flash attention"),
    ("StaticCache, compiled", "1.0"): ("#e08e45", "StaticCache, compiled"),
    ("kvpolicy", "0.3"): ("#5aa469", "kvpolicy, 30 %"),
    ("kvpolicy, compiled", "1.0"): ("#9cc5e4", "compiled, everything kept"),
    ("kvpolicy, compiled", "0.3"): ("#1b6ca8", "compiled, 30 %"),
    ("kvpolicy, compiled", "0.1"): ("#0b3c5d", "compiled, 10 %"),
}


def bars(axis: Any, rows: dict[tuple[str, str], Row], column: str, title: str, unit: str) -> None:
    shown = [(BARS[key], rows[key]) for key in BARS if key in rows and rows[key][column]]
    for place, ((colour, _), row) in enumerate(shown):
        value = float(row[column])
        axis.barh(-place, value, color=colour)
        axis.text(value, -place, f" {value:.1f}", va="center", fontsize=8)
        if column == "ms_per_token":
            floor = float(row["floor_ms"])
            axis.plot([floor, floor], [-place - 0.4, -place + 0.4], color="black", linewidth=1.5)
    axis.set_yticks([-place for place in range(len(shown))], [name for (_, name), _ in shown], fontsize=8)
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(unit, fontsize=8)
    axis.set_xlim(right=axis.get_xlim()[1] * 1.12)
    axis.spines[["top", "right"]].set_visible(False)


def batches(axis: Any, rows: list[Row]) -> None:
    for place, row in enumerate(rows):
        value = float(row["tokens_per_second"])
        axis.barh(-place, value, color="#1b6ca8" if "kvpolicy" in row["cache"] else "#b0b0b0")
        axis.text(value, -place, f" {value:.0f}", va="center", fontsize=8)
    names = [f"{row['cache'].split(',')[0]}, {float(row['kept']):.0%},\nbatch {row['batch']}" for row in rows]
    axis.set_yticks([-place for place in range(len(rows))], names, fontsize=8)
    axis.set_title("largest batch at 32k", fontsize=10)
    axis.set_xlabel("tokens per second", fontsize=8)
    axis.set_xlim(right=axis.get_xlim()[1] * 1.15)
    axis.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("results", help="--out of decode_graph.py")
    parser.add_argument("images", help="folder")
    options = parser.parse_args()
    rows = read_csv(f"{options.results}.csv")
    single: dict[str, dict[tuple[str, str], Row]] = {}
    for row in rows:
        if row["batch"] == "1" and row["policy"] in ("", "streaming") and row["budget"] in ("", "growing"):
            single.setdefault(row["context"], {})[row["cache"], row["kept"]] = row
    figure, axes = plt.subplot_mosaic(
        [["32k ms", "32k GB", "batch"], ["128k ms", "128k GB", "batch"]], figsize=(15, 6), width_ratios=[2, 2, 1.2]
    )
    for context, name in (("32768", "32k"), ("131072", "128k")):
        bars(axes[f"{name} ms"], single[context], "ms_per_token", f"a token at {name} (line: floor)", "ms")
        bars(axes[f"{name} GB"], single[context], "peak_gigabytes", f"peak memory of a {name} prompt", "GB")
    batches(axes["batch"], [row for row in rows if row["batch"] != "1"])
    figure.suptitle(f"{rows[0]['model']} weights, bf16, {rows[0]['device']}", fontsize=11)
    figure.tight_layout()
    figure.savefig(f"{options.images}/decode_graph.png", dpi=100)


if __name__ == "__main__":
    main()
