"""Scores by depth and length as one PNG. Import this module only to draw: matplotlib takes a second."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.colors import LinearSegmentedColormap

from kvpolicy.report.canvas import canvas, png
from kvpolicy.report.depth_map import DepthMap
from kvpolicy.report.numbers import percent

_COLUMNS = 3  # panels beside each other
_COLOURS = LinearSegmentedColormap.from_list("found", ["#b2182b", "#f7f7f7", "#2166ac"])


def depths_png(grids: Sequence[DepthMap], title: str, metric: str) -> bytes:
    """A panel for each: depths go down, lengths to the right, and each cell says its score."""
    columns = min(len(grids), _COLUMNS)
    rows = math.ceil(len(grids) / columns)
    depths, lengths = grids[0].values.shape
    size = columns * (1.2 + 0.55 * lengths) + 0.8, rows * (1.1 + 0.34 * depths)
    figure = canvas(*size, title)
    panels = [figure.add_subplot(rows, columns, index + 1) for index in range(len(grids))]
    for axes, grid in zip(panels, grids, strict=True):
        image = _panel(axes, grid)
    bar = figure.colorbar(image, ax=panels, pad=0.02, aspect=max(20, 8 * rows))
    bar.set_label(metric.replace("_", " "), fontsize=9)
    return png(figure)


def _panel(axes: Any, grid: DepthMap) -> Any:
    image = axes.imshow(grid.values.numpy(), aspect="auto", cmap=_COLOURS, vmin=0.0, vmax=1.0)
    for row, scores in enumerate(grid.values.tolist()):
        for column, score in enumerate(scores):
            dark = score < 0.2 or score > 0.8
            if not math.isnan(score):
                look = {"ha": "center", "va": "center", "fontsize": 8, "color": "white" if dark else "black"}
                axes.text(column, row, f"{score:.2f}", **look)
    axes.set_xticks(range(len(grid.lengths)), [str(length) for length in grid.lengths], fontsize=8)
    axes.set_yticks(range(len(grid.depths)), [percent(depth) for depth in grid.depths], fontsize=8)
    axes.set_xlabel("tokens of the prompt", fontsize=9)
    axes.set_ylabel("depth", fontsize=9)
    axes.set_title(grid.title, fontsize=9, parse_math=False)
    return image
