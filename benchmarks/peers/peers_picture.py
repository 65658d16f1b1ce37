"""The picture of the head to head: what each cache holds, and what is still said behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

COLOURS = {"kvpolicy": "#1b6ca8", "kvpress": "#c44e52", "transformers": "0.55", "vLLM": "#e08e45"}
TURNS = {"score": ("first question", 0.4), "second_turn": ("asked again", 0.0)}


def picture(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """rows: as head_to_head.py writes them, errors left out; numbers may be text"""
    rows = [row for row in rows if row.get("bytes")]
    dense = next(float(row["bytes"]) for row in rows if row["method"] == "DynamicCache")
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 0.34 * len(rows) + 1.4), layout="constrained", sharey=True, width_ratios=(1, 1)
    )
    colours = [COLOURS[str(row["tool"]).split()[0]] for row in rows]
    names = [name(row, rows) for row in rows]
    parts = [100 * float(row["bytes"]) / dense for row in rows]
    left.barh(range(len(rows)), parts, color=colours)
    for place, part in enumerate(parts):
        left.annotate(f" {part:.1f}", (part, place), fontsize=8, va="center")
    for turn, (said, lift) in TURNS.items():
        values = [100 * float(row[turn]) for row in rows]
        shade = 1.0 if lift else 0.5
        right.barh([place - lift / 2 + 0.1 for place in range(len(rows))], values, 0.36, color=colours, alpha=shade)
        right.plot([], [], color="black", alpha=shade, linewidth=6, label=said)
    left.set_yticks(range(len(rows)), names, fontsize=8)
    left.invert_yaxis()
    titled(left, "bytes that are held, % of DynamicCache's")
    titled(right, f"pass keys said, %, n = {rows[0]['n']}")
    left.set_xlim(0, 1.12 * max(100.0, *parts))
    figure.legend(fontsize=8, frameon=False, loc="outside lower right", ncols=2)
    about = rows[0]
    figure.suptitle(f"{about['model']}, {about['dtype']} on {about['device']}, {about['context']} tokens", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def name(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """Tool, method and what is kept; and the transformers of a row that another stands beside under another one."""
    same = [other for other in rows if all(other[part] == row[part] for part in ("tool", "method", "kept"))]
    under = f" (transformers {row['transformers']})" if len(same) > 1 else ""
    return f"{row['tool']}, {row['method']}, {float(row['kept']):.0%}{under}"


def titled(axis: Axes, title: str) -> None:
    axis.set_title(title, fontsize=9)
    axis.set_xlim(0, 112)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
