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


def agreement_png(agreement: Agreement, title: str) -> bytes:
    """Three matrices: estimators on one text, then the first estimator on single prompts and on several texts."""
    first = agreement.estimators[0]
    panels = [
        ("across estimators", agreement.estimators, agreement.estimator),
        (f"across prompts, {first}", agreement.prompts, agreement.prompt[0]),
        (f"across texts, {first}", agreement.texts, agreement.text[0]),
    ]
    names = [[textwrap.fill(name, 26) for name in names] for _, names, _ in panels]
    widths = [0.1 * _widest(column) + _CELL * max(2.5, len(column)) for column in names]
    height = 0.9 + _CELL * max(len(column) for column in names)
    chance = chance_correlation(agreement.num_heads)
    heads = f"{agreement.num_heads} KV heads; unrelated rankings stay within {chance:.2f} of 0 in 95 % of cases"
    figure = canvas(sum(widths) + 1.4, height, f"{title}\n{heads}")
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
            label = "none" if math.isnan(value) else f"{value:.2f}"
            axes.text(j, i, label, ha="center", va="center", fontsize=7, color="white" if abs(value) > 0.6 else "black")
    numbers = range(len(names))
    axes.set_xticks(numbers, [str(number + 1) for number in numbers], fontsize=8)
    axes.set_yticks(
        numbers, [f"{name}  {number + 1}" for number, name in enumerate(names)], fontsize=8, parse_math=False
    )
    axes.set_title(heading, fontsize=9, parse_math=False)
    return image


def _widest(names: list[str]) -> int:
    return max(len(line) for name in names for line in name.split("\n"))
