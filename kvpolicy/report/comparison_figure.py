"""A comparison as one PNG. Import this module only where something is drawn: matplotlib takes a second."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kvpolicy.comparison.quality import Figures, figures
from kvpolicy.comparison.results_file import Comparison
from kvpolicy.files.plain import plain
from kvpolicy.report.numbers import percent

_DPI = 130
_MARKERS = "osD^vP*X<>"


def comparison_png(comparison: Comparison) -> bytes:
    """What eviction costs, with 95 % intervals: over the bytes that are held, and as a bar for each row."""
    rows = [row for row in figures(comparison) if row.excess is not None]
    kept = [level for level in (1.0, *comparison.levels) if any(row.retention == level for row in rows)]
    levels = [(level, [row for row in rows if row.retention == level]) for level in kept]
    bars = len(rows) + 2 * len(levels)
    heights = [5.0, 0.8 + 0.21 * bars]
    figure = Figure(figsize=(10.0, sum(heights)), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, height_ratios=heights)
    unit = "answers lost, % of all" if comparison.is_retrieval else "perplexity above the full cache, %"
    _pareto(above, rows, unit)
    _bars(below, levels, unit)
    figure.suptitle(plain(_title(comparison)), fontsize=10, parse_math=False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


def _pareto(axes: Any, rows: list[Figures], unit: str) -> None:
    methods = _methods(rows)
    for index, method in enumerate(methods):
        _line(axes, index, [row for row in rows if row.method == method])
    front = pareto_front(rows)
    places, costs = [row.bytes / 1e6 for row in front], [_cost(row) for row in front]
    axes.plot(places, costs, color="0.4", linewidth=6, alpha=0.25, zorder=0, label="best at its bytes or fewer")
    axes.axhline(0.0, color="black", linewidth=1, linestyle=":", label="full cache")
    axes.set_xlabel("cache after the prompt, MB")
    axes.set_ylabel(unit)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)


def _bars(axes: Any, levels: list[tuple[float, list[Figures]]], unit: str) -> None:
    """A group for each level, the least cost first; colours are those of the lines."""
    methods = _methods([row for _, rows in levels for row in rows])
    place, ticks = 0, []
    for kept, rows in levels:
        ticks.append((place, f"{percent(kept)} kept"))
        for row in sorted(rows, key=_cost):
            place += 1
            ticks.append((place, plain(row.method)))
            error = [[x] for x in _whiskers(row)]
            color = f"C{methods.index(row.method) % 10}"
            axes.barh(place, _cost(row), xerr=error, color=color, height=0.8, error_kw={"linewidth": 1, "capsize": 2})
        place += 2
    axes.set_yticks([at for at, _ in ticks], [name for _, name in ticks], fontsize=8, parse_math=False)
    axes.axvline(0.0, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.grid(alpha=0.3, axis="x")


def pareto_front(rows: list[Figures]) -> list[Figures]:
    """The rows that no other beats at as many bytes or fewer, by bytes."""
    front: list[Figures] = []
    for row in sorted(rows, key=lambda row: (row.bytes, _cost(row))):
        if not front or _cost(row) < _cost(front[-1]):
            front.append(row)
    return front


def _line(axes: Any, index: int, rows: list[Figures]) -> None:
    rows = sorted(rows, key=lambda row: row.bytes)
    below, above = zip(*map(_whiskers, rows), strict=True)
    axes.errorbar(
        [row.bytes / 1e6 for row in rows],
        [_cost(row) for row in rows],
        yerr=[below, above],
        marker=_MARKERS[index % len(_MARKERS)],
        color=f"C{index % 10}",
        markersize=5,
        linewidth=1.2,
        capsize=2,
        label=plain(rows[0].method),
    )


def _whiskers(row: Figures) -> tuple[float, float]:
    """How far the interval reaches below and above the cost."""
    return max(0.0, _cost(row) - 100 * (row.low or 0.0)), max(0.0, 100 * (row.high or 0.0) - _cost(row))


def _cost(row: Figures) -> float:
    return 100 * (row.excess or 0.0)


def _methods(rows: list[Figures]) -> list[str]:
    return list(dict.fromkeys(row.method for row in rows))


def _title(comparison: Comparison) -> str:
    shown = [str(comparison.about[name]) for name in ("model", "text") if comparison.about.get(name)]
    return ", ".join([comparison.task, *shown])
