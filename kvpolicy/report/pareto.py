"""Quality over bytes as one PNG. Import this module only where something is drawn: matplotlib takes a second."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kvpolicy.compare.document import Comparison
from kvpolicy.compare.figures import Figures, figures

_DPI = 130
_MARKERS = "osD^vP*X<>"
_STEEP = 20.0  # times the smallest excess at which the axis turns logarithmic


def pareto_png(comparison: Comparison) -> bytes:
    """What eviction costs over the bytes that are held, a line for each method, with 95 % intervals and the front."""
    rows = [row for row in figures(comparison) if row.excess is not None]
    methods = list(dict.fromkeys(row.method for row in rows))
    figure = Figure(figsize=(9.0, 1.2 + max(4.0, 0.24 * len(methods))), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for index, method in enumerate(methods):
        _line(axes, index, [row for row in rows if row.method == method])
    front = pareto_front(rows)
    axes.plot(
        [row.bytes / 1e6 for row in front], [_cost(row) for row in front], color="0.4", linewidth=5, alpha=0.25,
        zorder=0, label="the best at its bytes or fewer",
    )  # fmt: skip
    axes.axhline(0.0, color="black", linewidth=1, linestyle=":", label="full cache")
    costs = [_cost(row) for row in rows]
    if costs and min(costs) > 0 and max(costs) > _STEEP * min(costs):
        axes.set_yscale("symlog", linthresh=max(1.0, min(costs)))
    axes.set_xlabel("cache after the prompt, MB")
    axes.set_ylabel("passkeys lost, % of all" if comparison.task == "passkey" else "perplexity above the full cache, %")
    axes.set_title(_title(comparison), fontsize=10, parse_math=False)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


def pareto_front(rows: list[Figures]) -> list[Figures]:
    """The rows that no other beats at as many bytes or fewer, by bytes."""
    front: list[Figures] = []
    for row in sorted(rows, key=lambda row: (row.bytes, _cost(row))):
        if not front or _cost(row) < _cost(front[-1]):
            front.append(row)
    return front


def _line(axes: Any, index: int, rows: list[Figures]) -> None:
    rows = sorted(rows, key=lambda row: row.bytes)
    costs = [_cost(row) for row in rows]
    below = [cost - 100 * (row.low or 0.0) for cost, row in zip(costs, rows, strict=True)]
    above = [100 * (row.high or 0.0) - cost for cost, row in zip(costs, rows, strict=True)]
    axes.errorbar(
        [row.bytes / 1e6 for row in rows],
        costs,
        yerr=[[max(0.0, x) for x in below], [max(0.0, x) for x in above]],
        marker=_MARKERS[index % len(_MARKERS)],
        color=f"C{index % 10}",
        markersize=5,
        linewidth=1.2,
        capsize=2,
        label=rows[0].method.replace("_", " "),
    )


def _cost(row: Figures) -> float:
    return 100 * (row.excess or 0.0)


def _title(comparison: Comparison) -> str:
    shown = [str(comparison.about[name]) for name in ("model", "text") if comparison.about.get(name)]
    return ", ".join([comparison.task, *shown])
