"""Scores by the depth of what is asked for and the length of the prompt: numbers, and the map of them in a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvpolicy.report.numbers import percent
from kvpolicy.report.shades import Shade
from kvpolicy.report.terminal_heatmap import Heatmap

_LOST, _HALF, _FOUND = (178, 24, 43), (247, 247, 247), (33, 102, 172)


@dataclass(frozen=True, slots=True, eq=False)
class DepthMap:
    """One row of an evaluation as a table of cells.

    title: whose scores they are
    values: `[depths, lengths]`, the mean score of each cell, NaN where there was no sample
    depths, lengths: of the rows and the columns, rising
    """

    title: str
    values: Tensor
    depths: tuple[float, ...]
    lengths: tuple[int, ...]


def depth_maps(rows: Sequence[Mapping[str, Any]]) -> list[DepthMap]:
    """Of each row of an evaluation that has cells, which is a task whose samples name their depth and length."""
    return [_grid(row) for row in rows if "grid" in row]


def terminal_depths(grid: DepthMap) -> Heatmap:
    """Red where what was asked for is lost, blue where it is found."""
    colours, depths = (_LOST, _HALF, _FOUND), [percent(depth) for depth in grid.depths]
    return Heatmap(grid.title, grid.values, depths, Shade(float, colours), corner="depth", columns=grid.lengths)


def _grid(row: Mapping[str, Any]) -> DepthMap:
    cells = {(cell["depth"], cell["length"]): cell["score"] for cell in row["grid"]}
    depths, lengths = (tuple(sorted({place[axis] for place in cells})) for axis in (0, 1))
    values = [[cells.get((depth, length), float("nan")) for length in lengths] for depth in depths]
    kept = "" if row["retention"] == 1 else f", {percent(row['retention'])} kept"
    return DepthMap(f"{row['plan']}{kept}", torch.tensor(values), depths, lengths)
