"""The pictures of docs/explanation/vllm-costs.md, from the rows of serve.py; of a job that ran twice, the medians.

cd plugins/vllm/benchmarks
python plot_serve.py results/serve_h200.csv ../../../docs/images/vllm.png
python plot_serve.py results/serve_h200.csv ../../../docs/images/vllm-trace.png --trace
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NAMES = {
    "dense": "dense",
    "fp8": "dense, fp8",
    "slab-20": "slab, 20 %",
    "blocks-20": "blocks, 20 %",
    "keydiff-20": "keydiff, 20 %",
    "snapkv-20": "snapkv, 20 %",
}
COLORS = {
    "dense": "0.55",
    "dense, fp8": "0.75",
    "slab, 20 %": "tab:blue",
    "blocks, 20 %": "tab:cyan",
    "keydiff, 20 %": "tab:green",
    "snapkv, 20 %": "tab:olive",
}


class Rows:
    """Figures of a CSV by job, run and column."""

    def __init__(self, path: Path) -> None:
        self._rows = defaultdict(list)
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                self._rows[row["job"], row["run"]].append(row)

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key in self._rows

    def get(self, job: str, run: str, column: str) -> float:
        return statistics.median(float(row[column]) for row in self._rows[job, run])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("image", type=Path)
    parser.add_argument("--trace", action="store_true", help="requests that arrive one by one")
    options = parser.parse_args()
    draw = draw_trace if options.trace else draw_batches
    figure = draw(Rows(options.rows))
    for axis in figure.axes:
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(options.image, dpi=130)


def draw_batches(rows: Rows) -> Any:
    figure, axes = plt.subplots(1, 3, figsize=(10.5, 3), layout="constrained", width_ratios=(6, 6, 3))
    panels = (
        ("fits", "concurrency", "requests of 32k that fit"),
        ("batch", "tokens_a_second", "tokens a second"),
    )
    for axis, (run, column, title) in zip(axes, panels, strict=False):
        found = {name: rows.get(job, run, column) for job, name in NAMES.items() if (job, run) in rows}
        bars = axis.bar(found.keys(), found.values(), color=[COLORS[name] for name in found])
        axis.bar_label(bars, fmt=_whole if run == "fits" else "%.0f", fontsize=8)
        axis.set_title(title, fontsize=9)
        axis.set_xticks(range(len(found)), [name.replace(", ", ",\n") for name in found])
    pairs = {"dense": ("dense", "dense-128k"), "slab, 30 %": ("slab-30", "slab-30-128k")}
    figures = {name: [rows.get(job, "single", "ms_a_token") for job in jobs] for name, jobs in pairs.items()}
    _side_by_side(axes[2], figures, ["32k", "128k"], "one request: ms a token", "%.2f")
    return figure


def draw_trace(rows: Rows) -> Any:
    """A row of panels for each pair of jobs that ran."""
    pairs = [("dense-trace", "slab-20-trace"), ("dense-trace-small", "slab-20-trace-small")]
    pairs = [jobs for jobs in pairs if all((job, "trace") in rows for job in jobs)]
    if not pairs:
        raise SystemExit("the CSV has no trace of both systems")
    figure, axes = plt.subplots(len(pairs), 3, figsize=(9.5, 2.6 * len(pairs)), layout="constrained", squeeze=False)
    for line, jobs in zip(axes, pairs, strict=True):
        memory = rows.get(jobs[0], "fits", "kv_bytes") / 1e9
        for axis, columns, labels, title, form in (
            (line[0], ("tokens_a_second",), [f"{memory:.0f} GB of cache"], "tokens a second", "%.0f"),
            (line[1], ("seconds_to_first_token", "seconds_to_first_token_p99"), ["median", "99 %"],
             "seconds to the first token", "%.2f"),
            (line[2], ("ms_a_token", "ms_a_token_p99"), ["median", "99 %"], "ms a token", "%.1f"),
        ):  # fmt: skip
            found = {
                name: [rows.get(job, "trace", column) for column in columns]
                for name, job in zip(("dense", "slab, 20 %"), jobs, strict=True)
            }
            _side_by_side(axis, found, labels, title, form)
    return figure


def _whole(requests: float) -> str:
    """Of 54.81 requests 54 are served at once."""
    return str(math.floor(requests))


def _side_by_side(axis: Any, figures: dict[str, list[float]], labels: Sequence[str], title: str, form: str) -> None:
    """Two bars for each label."""
    for place, (name, values) in enumerate(figures.items()):
        at = [number + 0.4 * place for number in range(len(labels))]
        bars = axis.bar(at, values, 0.38, label=name, color=("0.55", "tab:blue")[place])
        axis.bar_label(bars, fmt=form, fontsize=8)
    axis.set_xticks([number + 0.2 for number in range(len(labels))], labels)
    axis.set_title(title, fontsize=9)
    axis.legend(fontsize=7, frameon=False, loc="upper left")
    axis.margins(y=0.3)


if __name__ == "__main__":
    main()
