"""A comparison as tables, in the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from kvpolicy.comparison.methods import FULL
from kvpolicy.comparison.quality import BYTE_SPREAD, Figures, figures
from kvpolicy.comparison.results_file import Comparison
from kvpolicy.files.plain import markdown_text
from kvpolicy.report.grid import Grid
from kvpolicy.report.numbers import percent, size

NOTES = (
    "above full, lost: with a 95 % bootstrap interval over the sequences, paired with the full cache. "
    "of uniform's: perplexity above full, as a part of what uniform budgets add under the same policy, with its 95 % "
    "interval; empty where theirs is not clearly above 0. "
    "vs uniform: against uniform budgets under the same policy. vs random: against entries kept at random, under "
    "uniform budgets. Better or worse is said only where the 95 % interval of the paired difference leaves out 0, else "
    "it is unclear; no correction is made for the number of rows. ms/token: one token in the eager loop over a cache "
    "of one sequence, the median of 16. Bytes: of one real cache after its prompt, also as a part of what keys and "
    "values of all its tokens take."
)
INTERVAL, SHARE = "95 %", "of uniform's"
Cell = Callable[[Figures], str]


def levels(comparison: Comparison) -> Iterator[tuple[str, list[Figures]]]:
    """(heading, rows) of each retention, in each first the rows that evict nothing."""
    rows = figures(comparison)
    whole = [row for row in rows if row.retention == 1]
    for retention in comparison.levels:
        yield f"{percent(retention)} kept", [*whole, *(row for row in rows if row.retention == retention)]


def markdown(comparison: Comparison) -> str:
    """The whole page."""
    lines = ["# Methods at equal bytes", ""]
    lines += [f"- {markdown_text(name)}: {markdown_text(value)}" for name, value in about(comparison)]
    for heading, columns, rows, remarks in level_tables(comparison):
        lines += ["", f"## {heading}", "", _row(columns), "|" + "---|" * len(columns), *map(_row, rows)]
        lines += ["", " ".join(remarks)]
    return "\n".join([*lines, "", NOTES, ""])


def about(comparison: Comparison) -> list[tuple[str, str]]:
    """Name and text of what was compared, and where."""
    return [*((str(name), str(value)) for name, value in comparison.about.items()), ("device", _devices(comparison))]


def level_tables(comparison: Comparison) -> Iterator[tuple[str, list[str], list[list[str]], list[str]]]:
    """(heading, columns, rows, remarks) of each retention, with everything that is known, for a page."""
    columns: dict[str, Cell] = {**_columns(comparison), "calibration": _calibration, "note": lambda row: row.note}
    for heading, rows in levels(comparison):
        cells = [[cell(row) for cell in columns.values()] for row in rows]
        yield heading, list(columns), cells, _remarks(comparison, rows)


def _devices(comparison: Comparison) -> str:
    """Where the rows were measured: one device, and behind others the methods that they measured."""
    by_device: dict[str, list[str]] = {}
    for row in comparison.rows.values():
        methods = by_device.setdefault(row.device or "not recorded", [])
        if row.method not in methods:
            methods.append(row.method)
    first, *others = by_device
    return "; ".join([first, *(f"{name} for {', '.join(by_device[name])}" for name in others)])


def tables(comparison: Comparison) -> Iterator[tuple[Grid, list[str]]]:
    """For each retention a table for a terminal, and what else must be said about its rows."""
    columns = _narrow(_columns(comparison))
    for heading, rows in levels(comparison):
        table = Grid([*columns], [[cell(row) for cell in columns.values()] for row in rows], title=heading)
        notes = [f"{row.method}: {row.note}" for row in rows if row.error is not None or row.remark]
        yield table, [*_remarks(comparison, rows), *notes]


def _narrow(columns: dict[str, Cell]) -> dict[str, Cell]:
    """The same for a terminal: an interval stands beside its excess, and the rest is in the page."""
    narrow = {name: cell for name, cell in columns.items() if name != INTERVAL}
    for name in narrow.keys() & {"above full", "lost"}:
        narrow[name] = lambda row: f"{_excess(row)} ({_interval(row)})" if _excess(row) else ""
    if SHARE in narrow:
        narrow[SHARE] = lambda row: "" if row.share is None else f"{row.share.mean:.0%}"
    return narrow | {"bytes": lambda row: "" if row.error is not None else size(row.bytes)}


def _columns(comparison: Comparison) -> dict[str, Cell]:
    """What stands in each column, by its heading."""
    quality, excess = ("found", "lost") if comparison.is_retrieval else ("perplexity", "above full")
    quality = str(comparison.settings.get("metric", quality)).replace("_", " ")
    shares: dict[str, Cell] = {} if comparison.is_retrieval else {SHARE: _share}
    times: dict[str, Cell] = {"ms/token": lambda row: "" if row.decode_ms is None else f"{row.decode_ms:.3g}"}
    if all(row.decode_ms is None for row in comparison.rows.values()):
        times = {}
    return {
        "method": lambda row: row.method,
        quality: lambda row: "failed" if row.quality is None else f"{row.quality:.4g}",
        excess: _excess,
        INTERVAL: _interval,
        **shares,
        "vs uniform": lambda row: row.versus_uniform,
        "vs random": lambda row: row.versus_random,
        **times,
        "bytes": lambda row: "" if row.error is not None else f"{size(row.bytes)}, {row.bytes / row.dense_bytes:.0%}",
    }


def _excess(row: Figures) -> str:
    return "" if row.excess is None else f"{row.excess:+.1%}"


def _interval(row: Figures) -> str:
    return "" if row.low is None or row.high is None else f"{row.low:+.1%} to {row.high:+.1%}"


def _share(row: Figures) -> str:
    return "" if row.share is None else f"{row.share.mean:.0%}, {row.share.low:.0%} to {row.share.high:.0%}"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(map(markdown_text, cells))} |"


def _remarks(comparison: Comparison, rows: list[Figures]) -> list[str]:
    """How equal the bytes of a level are, and whether its task tells anything."""
    spread = max((row.excess_bytes for row in rows), default=0.0)
    if spread <= BYTE_SPREAD:
        remarks = [f"The bytes of this level differ by at most {spread:.2%}."]
    else:
        remarks = [f"The bytes of this level are not equal: they differ by {spread:.2%}, more than {BYTE_SPREAD:.0%}."]
    if comparison.is_retrieval and any(row.method == FULL and row.quality == 0 for row in rows):
        remarks.append("Nothing was found with the full cache: this task tells nothing about this model.")
    return remarks


def _calibration(row: Figures) -> str:
    calibration = row.calibration
    if "tokens" in calibration:
        if not calibration["tokens"]:
            return "none"
        tokens, forwards, seconds = (calibration[name] for name in ("tokens", "forwards", "seconds"))
        return f"{_compact(tokens)} tokens, {forwards} forwards, {seconds:.0f} s"
    known = [calibration.get(name) for name in ("trials", "search_sequences", "context_length")]
    return "not recorded" if None in known else "{} trials on {} x {} tokens".format(*known)


def _compact(count: int) -> str:
    """A count in thousands or millions: `65k`."""
    for unit, suffix in ((1_000_000, "M"), (1_000, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{suffix}"
    return str(count)
