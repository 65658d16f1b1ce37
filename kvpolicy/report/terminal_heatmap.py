"""Heat maps in the terminal: coloured cells that carry their numbers, so that they read without colour too."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.color import Color
from rich.console import Console, ConsoleOptions, RenderResult
from rich.style import Style
from rich.text import Text
from torch import Tensor

from kvpolicy.budget.plan import BudgetPlan, PlanLevel
from kvpolicy.report.numbers import percent, relative_budgets
from kvpolicy.report.shades import Shade, budget_shade, importance_shade, relative_importance

_CELL = 6


class Heatmap:
    """A rich renderable; wide tables are broken into blocks of columns that fit the console.

    values: `[L, H]`, NaN for an empty cell;  rows: what stands before each;  shade: their colours
    corner: what the rows are;  columns: what stands above each, None for the numbers of KV heads
    """

    def __init__(
        self,
        title: str,
        values: Tensor,
        rows: Sequence[object],
        shade: Shade,
        *,
        corner: str = "layer",
        columns: Sequence[object] | None = None,
    ) -> None:
        self._title, self._values, self._rows = title, values, rows
        self._shade, self._corner = shade, corner
        self._columns = range(values.shape[1]) if columns is None else columns
        self._across = "KV heads" if columns is None else "columns"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        label = max(len(self._corner), *(len(str(name)) for name in self._rows))
        fitting = max(1, (options.max_width - label) // _CELL)
        count = self._values.shape[1]
        for first in range(0, count, fitting):
            block = range(first, min(first + fitting, count))
            title = self._title if len(block) == count else f"{self._title}, {self._across} {block[0]} to {block[-1]}"
            yield Text(title, style="bold")
            names = "".join(f"{self._columns[column]!s:>{_CELL - 1}} " for column in block)
            yield Text(self._corner.rjust(label) + names, style="dim")
            for row, name in enumerate(self._rows):
                line = Text(str(name).rjust(label), no_wrap=True)
                for column in block:
                    line.append_text(self._cell(float(self._values[row, column])))
                yield line
            yield Text()

    def _cell(self, value: float) -> Text:
        if math.isnan(value):
            return Text(" " * _CELL)
        (red, green, blue), bright = self._shade.of(value)
        style = Style(
            color=Color.from_rgb(0, 0, 0) if bright else Color.from_rgb(255, 255, 255),
            bgcolor=Color.from_rgb(red, green, blue),
        )
        return Text(_short(value).rjust(_CELL - 1) + " ", style=style)


def budget_heatmap(plan: BudgetPlan, level: PlanLevel) -> Heatmap:
    """Budgets of one level as multiples of uniform: blue is less, red is more, four times either way is full colour."""
    title = f"{percent(level.retention)} kept: budget as a multiple of uniform"
    return Heatmap(title, relative_budgets(level), plan.model.budgeted_layers, budget_shade())


def importance_heatmap(per_head: Tensor, layers: Sequence[int]) -> Heatmap:
    """Importance `[L, H]` as multiples of its mean, from none (white) to the largest (green)."""
    relative = relative_importance(per_head)
    return Heatmap("importance as a multiple of its mean", relative, layers, importance_shade(relative))


def _short(value: float) -> str:
    """A number of at most five characters."""
    for text in (f"{value:.2f}", f"{value:.3g}", f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")):
        if len(text) <= _CELL - 1 and (value == 0 or float(text) != 0):
            return text
    return f"{value:.0e}"[: _CELL - 1]
