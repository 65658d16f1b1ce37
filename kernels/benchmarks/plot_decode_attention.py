"""The pictures of docs/benchmarks.md, from the CSVs of bench_decode_attention.py.

    python kernels/benchmarks/plot_decode_attention.py kernels/benchmarks/results/decode_attention_h200 docs/images

writes decode_attention.png (share of the read limit, by cell and kernel) and decode_attention_tables.png (random
tables against equal lengths).
"""

from __future__ import annotations

import statistics
from pathlib import Path

import matplotlib
from basics import command_line, read_csv

matplotlib.use("Agg")
import matplotlib.pyplot as plt

KERNELS = {
    "kvpolicy": ("#1b6ca8", "kvpolicy"),
    "flash_varlen": ("#e08e45", "FlashAttention 2 varlen, KV heads as sequences"),
    "padded_sdpa": ("#b0b0b0", "SDPA, padded to the longest"),
    "cudnn_sdpa": ("#6aa84f", "cuDNN, dense (equal lengths only)"),
    "flash_sdpa": ("#8e7cc3", "FlashAttention 2, dense (equal lengths only)"),
}


def cells(rows: list[dict[str, str]], path: Path) -> None:
    distributions = list(dict.fromkeys(row["distribution"] for row in rows))
    sizes = list(dict.fromkeys((row["batch"], row["mean_length"], row["megabytes"]) for row in rows))
    figure, axes = plt.subplots(1, len(distributions), figsize=(13, 4.2), sharey=True)
    width = 0.8 / len(KERNELS)
    for axis, distribution in zip(axes, distributions, strict=True):
        for place, (kernel, (colour, label)) in enumerate(KERNELS.items()):
            shares = {
                (row["batch"], row["mean_length"], row["megabytes"]): float(row["share_of_read_limit"])
                for row in rows
                if row["kernel"] == kernel and row["distribution"] == distribution
            }
            at = [i + (place - 2) * width for i in range(len(sizes))]
            axis.bar(at, [shares.get(size, 0.0) for size in sizes], width, color=colour, label=label)
        goal_of = {
            (row["batch"], row["mean_length"], row["megabytes"]): float(row["goal"]) for row in rows if row["goal"]
        }
        goals = [goal_of[size] for size in sizes]
        axis.scatter([i - 2 * width for i in range(len(sizes))], goals, marker="_", s=120, color="black", label="goal")
        axis.set_title(distribution)
        axis.set_xticks(range(len(sizes)), [f"{b} x {n}\n{mb} MB" for b, n, mb in sizes], fontsize=8)
        axis.set_ylim(0, 1)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("bytes of K and V per second / read limit")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, fontsize=9, frameon=False)
    figure.suptitle(f"Decode attention, batch x mean entries of a KV head ({rows[0]['device']}, bf16, cold L2)")
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    figure.savefig(path, dpi=110)


def tables(rows: list[dict[str, str]], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(8, 3.8))
    for dim, colour in zip(
        (64, 80, 96, 128, 256), ("#1b6ca8", "#6aa84f", "#e08e45", "#8e7cc3", "#c0504d"), strict=True
    ):
        own = [row for row in rows if int(row["dim"]) == dim]
        axis.scatter([float(row["megabytes"]) for row in own], [float(row["ratio"]) for row in own], s=18, alpha=0.8,
                     color=colour, label=f"head dim {dim}")  # fmt: skip
    ratios = [float(row["ratio"]) for row in rows]
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.axhline(1.15, color="black", linewidth=0.8, linestyle="--")
    axis.set_xscale("log")
    axis.set_xticks([64, 128, 256, 512, 1024], ["64", "128", "256", "512", "1024"])
    axis.minorticks_off()
    axis.set_xlabel("MB of keys and values")
    axis.set_ylabel("time / time of equal lengths")
    axis.set_title(
        f"{len(rows)} random tables: median {statistics.median(ratios):.3f}, worst {max(ratios):.3f} (goal 1.15)"
    )
    axis.legend(fontsize=8, frameon=False, ncols=3)
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("results", help="--out of bench_decode_attention.py")
    parser.add_argument("images", type=Path, help="folder")
    options = parser.parse_args()
    cells(read_csv(f"{options.results}_cells.csv"), options.images / "decode_attention.png")
    tables(read_csv(f"{options.results}_tables.csv"), options.images / "decode_attention_tables.png")


if __name__ == "__main__":
    main()
