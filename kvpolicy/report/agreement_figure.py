"""Agreement of rankings as one PNG. Import this module only where something is drawn: matplotlib takes a second."""

from __future__ import annotations

import math
import textwrap
from typing import Any

from torch import Tensor

from kvpolicy.measure.agreement import Agreement
from kvpolicy.measure.ranks import chance_correlation
from kvpolicy.report.canvas import canvas, png

_CELL = 0.47  # inches


def agreement_png(found: Agreement, title: str) -> bytes:
    """Three matrices: estimators on one text, then the first estimator on single prompts and on several texts."""
    first = found.estimators[0]
    panels = [
        ("across estimators", found.estimators, found.estimator),
        (f"across prompts, {first}", found.prompts, found.prompt[0]),
        (f"across texts, {first}", found.texts, found.text[0]),
    ]
    names = [[textwrap.fill(name, 26) for name in names] for _, names, _ in panels]
    widths = [0.1 * _widest(column) + _CELL * max(2.5, len(column)) for column in names]
    height = 0.9 + _CELL * max(len(column) for column in names)
    chance = (
        f"{found.num_heads} KV heads; unrelated rankings stay within {chance_correlation(found.num_heads):.2f} of 0"
    )
    figure = canvas(sum(widths) + 1.4, height, f"{title}\n{chance} in 95 % of cases")
    axes = figure.subplots(1, len(panels), width_ratios=[len(column) for column in names])
    for place, (heading, _, matrix), column in zip(axes, panels, names, strict=True):
        image = _panel(place, heading, column, matrix)
    figure.colorbar(image, ax=axes, label="Spearman's rank correlation", shrink=0.9, pad=0.02)
    return png(figure)


def _panel(axes: Any, heading: str, names: list[str], matrix: Tensor) -> Any:
    """Cells that carry their numbers, so that they read without colour too."""
    image = axes.imshow(matrix.numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
    for i, row in enumerate(matrix.tolist()):
        for j, value in enumerate(row):
            said = "none" if math.isnan(value) else f"{value:.2f}"
            axes.text(j, i, said, ha="center", va="center", fontsize=7, color="white" if abs(value) > 0.6 else "black")
    numbers = range(len(names))
    axes.set_xticks(numbers, [str(number + 1) for number in numbers], fontsize=8)
    axes.set_yticks(
        numbers, [f"{name}  {number + 1}" for number, name in enumerate(names)], fontsize=8, parse_math=False
    )
    axes.set_title(heading, fontsize=9, parse_math=False)
    return image


def _widest(names: list[str]) -> int:
    return max(len(line) for name in names for line in name.split("\n"))
