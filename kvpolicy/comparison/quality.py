"""What follows from the rows: quality, its distance from the full cache, and what may be said about it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from kvpolicy.comparison.methods import FULL, RANDOM, UNIFORM
from kvpolicy.comparison.results_file import Comparison, Row
from kvpolicy.measure.stats import ExcessShare, PairedDifference, excess_share, paired_difference

BYTE_SPREAD = 0.01
"""Rows of a level may differ by this part in their bytes and still be called equal."""


@dataclass(frozen=True, slots=True)
class Figures:
    """One row, read against the others of its level.

    quality:         perplexity (smaller is better), or the part of the answers that was found (larger is)
    excess, low, high: what eviction costs and its 95 % interval over sequences, paired with the full cache: perplexity
                     added, as a part of the full cache's; or answers lost, as a part of all
    share:           perplexity above the full cache's, as a part of what uniform budgets add under the same policy,
                     with its interval; None under retrieval, and where there is no such part (`excess_share`)
    versus_uniform, versus_random: "better", "worse", "unclear" (the interval meets 0), "more bytes"
                     (not comparable), '' where there is nothing to compare with
    decode_ms, bytes, dense_bytes, entries, calibration, error, remark: the row's
    excess_bytes:    above the smallest row of the level, as a part of that; 0 where nothing is evicted: no level then
    """

    method: str
    retention: float
    quality: float | None
    excess: float | None
    low: float | None
    high: float | None
    share: ExcessShare | None
    versus_uniform: str
    versus_random: str
    decode_ms: float | None
    bytes: int
    dense_bytes: int
    entries: int
    excess_bytes: float
    calibration: dict[str, Any]
    error: str | None
    remark: str

    @property
    def note(self) -> str:
        """Why a row counts less than the others, '' if it does not."""
        if self.error is not None:
            return f"failed: {self.error}"
        more = f"bytes not equal: {self.excess_bytes:.1%} above the smallest of the level"
        return "; ".join(
            [*([more] if self.excess_bytes > BYTE_SPREAD else []), *([self.remark] if self.remark else [])]
        )


def summary(comparison: Comparison) -> list[dict[str, Any]]:
    """The figures of all rows as JSON values."""
    return [asdict(figure) | {"note": figure.note} for figure in figures(comparison)]


def figures(comparison: Comparison) -> list[Figures]:
    """One for each row, in order."""
    return [_figures(comparison, row) for row in comparison.rows.values()]


def _figures(comparison: Comparison, row: Row) -> Figures:
    full = comparison.at(FULL, 1.0)
    quality: float | None = None
    excess = low = high = None
    if row.error is None:
        quality = _quality(comparison, row)
        if full is not None and row.method != FULL:
            excess, low, high = _excess(comparison, _difference(comparison, row, full))
    return Figures(
        row.method,
        row.retention,
        quality,
        excess,
        low,
        high,
        share=_share(comparison, row),
        versus_uniform=_verdict(comparison, row, row.uniform),
        versus_random=_verdict(comparison, row, f"{RANDOM}/{UNIFORM}"),
        decode_ms=row.decode_ms,
        bytes=row.bytes,
        dense_bytes=row.dense_bytes,
        entries=row.entries,
        excess_bytes=_excess_bytes(comparison, row),
        calibration=row.calibration,
        error=row.error,
        remark=row.remark,
    )


def _quality(comparison: Comparison, row: Row) -> float:
    mean = float(row.values().mean())
    return 1 - mean if comparison.is_retrieval else math.exp(mean)


def _excess(comparison: Comparison, difference: PairedDifference) -> tuple[float, float, float]:
    """A mean difference of losses is the logarithm of a quotient of perplexities."""
    interval = (difference.mean, difference.low, difference.high)
    mean, low, high = interval if comparison.is_retrieval else map(math.expm1, interval)
    return mean, low, high


def _share(comparison: Comparison, row: Row) -> ExcessShare | None:
    full, uniform = comparison.at(FULL, 1.0), comparison.at(row.uniform, row.retention)
    if row.error is not None or full is None or uniform is None or row.method == row.uniform:
        return None
    if comparison.is_retrieval or _holds_more(row, uniform):
        return None
    return excess_share(row.values(), uniform.values(), full.values(), int(comparison.settings["seed"]))


def _difference(comparison: Comparison, row: Row, other: Row) -> PairedDifference:
    return paired_difference(row.values(), other.values(), int(comparison.settings["seed"]))


def _verdict(comparison: Comparison, row: Row, method: str) -> str:
    other = comparison.at(method, row.retention)
    if row.error is not None or other is None or row.method == method:
        return ""
    if _holds_more(row, other):
        return "more bytes"
    difference = _difference(comparison, row, other)
    if difference.high < 0:
        return "better"
    return "worse" if difference.low > 0 else "unclear"


def _holds_more(row: Row, other: Row) -> bool:
    return row.bytes > (1 + BYTE_SPREAD) * other.bytes


def _excess_bytes(comparison: Comparison, row: Row) -> float:
    if row.error is not None or row.retention == 1:
        return 0.0
    rows = comparison.rows.values()
    level = [other.bytes for other in rows if other.retention == row.retention and other.error is None]
    return row.bytes / min(level) - 1
