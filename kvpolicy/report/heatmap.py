"""Heat maps of a plan as one PNG. Import this module only where something is drawn: matplotlib takes a second."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from kvpolicy.budget.plan import BudgetPlan, PlanLevel
from kvpolicy.report.canvas import canvas, png
from kvpolicy.report.numbers import method, model_name, percent, relative_budgets, sorted_levels

_COLUMNS = 5  # panels beside each other
_WIDEST_FOLD = 4.0  # times more or less than uniform at which the colours end, unless the plan stays closer


def plan_png(plan: BudgetPlan) -> bytes:
    """The importance, where the plan has it, and a panel per level with budgets as multiples of uniform."""
    levels = sorted_levels(plan)
    panels: list[Callable[[Figure, Any], None]] = []
    layers = plan.model.budgeted_layers
    if plan.importance is not None:
        per_head = plan.importance.per_head
        panels.append(lambda figure, axes: _importance(figure, axes, per_head, layers))
    folds = _folds(levels)
    for level in levels:
        panels.append(lambda figure, axes, level=level: _budgets(figure, axes, level, layers, folds))  # type: ignore[misc]
    kept = ", ".join(percent(level.retention) for level in levels)
    return _draw(panels, plan.model.table_shape, f"{model_name(plan)}\n{method(plan)}, {kept} kept")


def importance_png(per_head: Tensor, layers: Sequence[int], title: str) -> bytes:
    """Importance `[L, H]` of the given model layers."""
    return _draw([lambda figure, axes: _importance(figure, axes, per_head, layers)], tuple(per_head.shape), title)


def _draw(panels: Sequence[Callable[[Figure, Any], None]], shape: tuple[int, ...], title: str) -> bytes:
    columns = min(len(panels), _COLUMNS)
    rows = math.ceil(len(panels) / columns)
    width = columns * (1.7 + min(4.0, max(1.2, 0.22 * shape[1])))
    figure = canvas(width, rows * (1.3 + min(12.0, max(1.6, 0.13 * shape[0]))), title)
    for index, panel in enumerate(panels):
        panel(figure, figure.add_subplot(rows, columns, index + 1))
    return png(figure)


def _panel(
    figure: Figure, axes: Any, values: Any, layers: Sequence[int], cmap: str, norm: Any, extend: str = "neither"
) -> Any:
    """The cells and axes of one panel; returns its colour bar."""
    image = axes.imshow(values, aspect="auto", interpolation="nearest", cmap=cmap, norm=norm)
    heads = values.shape[1]
    columns = range(0, heads, math.ceil(heads / 10))
    rows = range(0, len(layers), math.ceil(len(layers) / 20))
    axes.set_xticks(columns, [str(head) for head in columns], fontsize=8)
    axes.set_yticks(rows, [str(layers[row]) for row in rows], fontsize=8)
    axes.set_xlabel("KV head", fontsize=9)
    axes.set_ylabel("layer", fontsize=9)
    long = max(20, 1.6 * len(layers))  # keeps the bar as tall as the panel
    bar = figure.colorbar(image, ax=axes, aspect=long, pad=0.03, extend=extend)
    bar.ax.tick_params(labelsize=8)
    return bar


def _importance(figure: Figure, axes: Any, per_head: Tensor, layers: Sequence[int]) -> None:
    values = per_head.detach().cpu().numpy()
    _panel(figure, axes, values, layers, "viridis", Normalize(0.0, float(values.max()) or 1.0))
    axes.set_title("importance", fontsize=10)


def _folds(levels: Sequence[PlanLevel]) -> float:
    """log2 of the multiple of uniform at which the colours end: one scale for all levels, at least twofold."""
    relative = np.concatenate([relative_budgets(level).numpy().ravel() for level in levels])
    spread = np.abs(np.log2(np.clip(relative, 1 / _WIDEST_FOLD, _WIDEST_FOLD)))
    return max(1.0, float(spread.max()))


def _extend(values: Any, folds: float) -> str:
    """Which ends of the colour bar are marked as open, because some cell lies beyond."""
    below, above = bool((values < -folds - 1e-9).any()), bool((values > folds + 1e-9).any())
    return {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[below, above]


def _budgets(figure: Figure, axes: Any, level: PlanLevel, layers: Sequence[int], folds: float) -> None:
    values = np.log2(np.clip(relative_budgets(level).numpy(), 2.0**-10, None))
    bar = _panel(figure, axes, values, layers, "RdBu_r", Normalize(-folds, folds), _extend(values, folds))
    bar.set_label("budget / uniform", fontsize=8)
    ticks = range(-math.floor(folds), math.floor(folds) + 1)
    bar.set_ticks(list(ticks), labels=[f"1/{2**-fold}x" if fold < 0 else f"{2**fold}x" for fold in ticks])
    shown = [("perplexity", "heldout"), ("uniform", "heldout_uniform"), ("full", "heldout_full")]
    lines = [f"{name} {level.perplexity[key]:.2f}" for name, key in shown if key in level.perplexity]
    axes.set_title("\n".join([f"{percent(level.retention)} kept", *lines]), fontsize=9)
