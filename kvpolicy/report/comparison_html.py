"""A comparison as one HTML file that needs nothing beside it."""

from __future__ import annotations

from kvpolicy.comparison.quality import Figures, figures
from kvpolicy.comparison.results_file import Comparison
from kvpolicy.report.chart import Point, Series, chart
from kvpolicy.report.comparison_tables import NOTES, about, level_tables
from kvpolicy.report.numbers import percent, size
from kvpolicy.report.page import facts, grid, page, text


def comparison_html(comparison: Comparison) -> str:
    """The whole document: quality over bytes with intervals, and a table for each retention."""
    sections = [facts(about(comparison)), _quality(comparison)]
    for heading, columns, rows, remarks in level_tables(comparison):
        cells = [dict(zip(columns, row, strict=True)) for row in rows]
        shown = [name for name in columns if name != "note" and any(row[name] for row in cells)]
        table = grid(shown, [[row[name] for name in shown] for row in cells], words=["calibration"])
        notes = [f"{row[columns[0]]}: {row['note']}" for row in cells if row["note"]]
        sections += [f"<h2>{text(heading)}</h2>", table]
        sections += [f'<p class="note">{text(line)}</p>' for line in (" ".join(remarks), *notes)]
    return page(f"Methods at equal bytes: {comparison.task}", [*sections, f'<p class="note">{text(NOTES)}</p>'])


def _quality(comparison: Comparison) -> str:
    """What eviction costs over the bytes that are held; nothing where no row was measured beside the full cache."""
    rows = [row for row in figures(comparison) if row.excess is not None]
    series = [
        Series(method, tuple(_point(row) for row in sorted(rows, key=lambda row: row.bytes) if row.method == method))
        for method in dict.fromkeys(row.method for row in rows)
    ]
    if not series:
        return ""
    unit = "answers lost, % of all" if comparison.is_retrieval else "perplexity above the full cache, %"
    return chart("Quality over bytes", series, "cache after the prompt, MB", unit, ("full cache", 0.0))


def _point(row: Figures) -> Point:
    cost, low, high = (None if value is None else 100 * value for value in (row.excess, row.low, row.high))
    said = f"{percent(row.retention)} kept, {size(row.bytes)}, {row.excess or 0.0:+.2%}"
    if row.low is not None and row.high is not None:
        said += f" ({row.low:+.2%} to {row.high:+.2%})"
    return Point(row.bytes / 1e6, cost or 0.0, said, low, high)
