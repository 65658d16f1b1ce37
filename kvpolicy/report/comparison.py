"""A comparison as tables, in the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from kvpolicy.compare.document import Comparison
from kvpolicy.compare.figures import BYTE_SPREAD, Figures, figures
from kvpolicy.compare.methods import FULL
from kvpolicy.report.figures import percent, size

NOTES = (
    "above full, lost: with a 95 % bootstrap interval over the sequences, paired with the full cache. "
    "vs uniform: against uniform budgets under the same policy. vs random: against entries kept by lot, under uniform "
    "budgets. Better or worse is said only where the 95 % interval of the paired difference leaves out 0, else "
    "it is unclear; no correction is made for the number of rows. Bytes: of one real cache after its prompt."
)


def levels(comparison: Comparison) -> Iterator[tuple[str, list[Figures]]]:
    """(heading, rows) of each retention, the full cache first in each."""
    rows = figures(comparison)
    full = [row for row in rows if row.retention == 1]
    for retention in comparison.levels:
        yield f"{percent(retention)} kept", [*full, *(row for row in rows if row.retention == retention)]


def markdown(comparison: Comparison) -> str:
    """The whole page."""
    lines = ["# Methods at equal bytes", ""]
    lines += [f"- {name}: {' '.join(str(value).split())}" for name, value in comparison.about.items()]
    names = [*_columns(comparison), "calibration", "note"]
    for heading, rows in levels(comparison):
        lines += ["", f"## {heading}", "", _row(names), "|" + "---|" * len(names)]
        lines += [_row([*_cells(row), _calibration(row), row.note]) for row in rows]
        lines += ["", " ".join(_said(comparison, rows))]
    return "\n".join([*lines, "", NOTES, ""])


def tables(comparison: Comparison) -> Iterator[tuple[Table, list[str]]]:
    """For each retention a table, and what else must be said about its rows."""
    for heading, rows in levels(comparison):
        table = Table(title=heading, title_justify="left")
        for name in _columns(comparison):
            table.add_column(name, no_wrap=name in ("method", "bytes"), overflow="fold")
        for row in rows:
            table.add_row(*_cells(row))
        failed = [f"{row.method} failed: {row.error}" for row in rows if row.error is not None]
        yield table, [*_said(comparison, rows), *failed]


def _columns(comparison: Comparison) -> list[str]:
    quality, excess = ("found", "lost") if comparison.is_retrieval else ("perplexity", "above full")
    return ["method", quality, excess, "95 %", "vs uniform", "vs random", "bytes"]


def _cells(row: Figures) -> list[str]:
    if row.quality is None:
        return [row.method, "failed", "", "", "", "", ""]
    has_interval = row.excess is not None and row.low is not None and row.high is not None
    return [
        row.method,
        f"{row.quality:.4g}",
        f"{row.excess:+.1%}" if has_interval else "",
        f"{row.low:+.1%} to {row.high:+.1%}" if has_interval else "",
        row.versus_uniform,
        row.versus_random,
        size(row.bytes),
    ]


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _said(comparison: Comparison, rows: list[Figures]) -> list[str]:
    """How equal the bytes of a level are, and whether its task tells anything."""
    spread = max((row.excess_bytes for row in rows), default=0.0)
    if spread <= BYTE_SPREAD:
        said = [f"The bytes of this level differ by at most {spread:.2%}."]
    else:
        said = [f"The bytes of this level are not equal: they differ by {spread:.2%}, more than {BYTE_SPREAD:.0%}."]
    if comparison.is_retrieval and any(row.method == FULL and row.quality == 0 for row in rows):
        said.append("Nothing was found with the full cache: this task tells nothing about this model.")
    return said


def _calibration(row: Figures) -> str:
    if row.calibration is None:
        return "none"
    known = [row.calibration.get(name) for name in ("trials", "search_sequences", "context_length")]
    return "not recorded" if None in known else "{} trials on {} x {} tokens".format(*known)
