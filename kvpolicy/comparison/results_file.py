"""The file of a comparison: what was measured, for whom, under which settings."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvpolicy.errors import KVPolicyError, PlanError
from kvpolicy.files.fields import Fields, check_json, describe, number, parse, read_bytes, render, sequence, text, whole
from kvpolicy.files.regular import write_bytes

FORMAT = "kvpolicy-comparison"
VERSION = 2
"""1 had equal entries in place of equal bytes, and no decode time."""
RETRIEVAL = ("passkey", "key-value")
"""Tasks of compare alone, whose losses are 0 for an answer that was found and 1 for one that was not."""
TASKS = ("perplexity", *RETRIEVAL)
"""Those whose settings name no metric."""
_MOST_NATS = 700.0
"""A loss whose perplexity is still a number."""


@dataclass(frozen=True, slots=True)
class Row:
    """One method at one retention.

    retention:   1 where nothing is evicted: the full cache, and quantized ones
    identity:    of the method, see `Method.identity`
    uniform:     the method whose budgets this one's are compared with, '' for none
    calibration: see `Method.calibration`; of a row that failed it may be empty
    losses:      one for each sequence, smaller is better; empty where the method failed
    bytes, dense_bytes, entries: of one real cache after its prompt
    decode_ms:   milliseconds of a token decoded on that cache, None where it was not timed
    error:       why the method failed
    remark:      what a reader should know besides
    device:      its name, '' where the file does not say
    """

    method: str
    retention: float
    identity: dict[str, Any]
    uniform: str
    calibration: dict[str, Any] = field(default_factory=dict)
    losses: tuple[float, ...] = ()
    bytes: int = 0
    dense_bytes: int = 0
    entries: int = 0
    decode_ms: float | None = None
    error: str | None = None
    remark: str = ""
    device: str = ""

    @property
    def key(self) -> tuple[str, float]:
        return self.method, self.retention

    def values(self) -> Tensor:
        """float64 `[n]`, the losses."""
        return torch.tensor(self.losses, dtype=torch.float64)


@dataclass(frozen=True, slots=True)
class Comparison:
    """settings: what must agree for rows to stand in one table; task, seed and more
    about:    names for a reader
    rows:     by method and retention, in the order of the tables
    """

    settings: dict[str, Any]
    about: dict[str, Any]
    rows: dict[tuple[str, float], Row] = field(default_factory=dict)

    @property
    def task(self) -> str:
        return str(self.settings["task"])

    @property
    def is_retrieval(self) -> bool:
        """Whether losses are 1 less a score, else nats."""
        return self.task != TASKS[0]

    @property
    def levels(self) -> list[float]:
        """Retentions below 1, largest first."""
        return sorted({row.retention for row in self.rows.values() if row.retention < 1}, reverse=True)

    def at(self, method: str, retention: float) -> Row | None:
        """The row, if there is one and it did not fail."""
        row = self.rows.get((method, retention))
        return row if row is not None and row.error is None else None

    def to_json(self) -> dict[str, Any]:
        rows = [asdict(row) | {"losses": list(row.losses)} for row in self.rows.values()]
        return {"format": FORMAT, "version": VERSION, "settings": self.settings, "about": self.about, "rows": rows}


def save_comparison(comparison: Comparison, path: Path, more: dict[str, Any] | None = None) -> None:
    """Writes the file in one step. more: what follows from the rows, for a reader; it is not read again."""
    write_bytes(path, render(comparison.to_json() | (more or {})).encode())


def load_comparison(path: Path) -> Comparison:
    """Raises `KVPolicyError` naming the file and what is wrong with it."""
    try:
        document = parse(read_bytes(path))
        fields = Fields(document)
        if fields.raw("format") != FORMAT:
            raise PlanError(f"format is no '{FORMAT}': another file is there")
        if fields.raw("version") != VERSION:
            raise PlanError(
                f"version is {describe(fields.raw('version'))}, expected {VERSION}: another kvpolicy measured its "
                "rows, which do not go with those of this one"
            )
        check_json(document, "")
        settings = fields.mapping("settings")
        if "task" not in settings or "seed" not in settings:
            raise PlanError("settings lacks task or seed")
        if settings["task"] not in TASKS and "metric" not in settings:
            raise PlanError(f"settings.task is {describe(settings['task'])}, expected one of {', '.join(TASKS)}")
        fields.fields("settings").read("seed", whole, -(2**31))
        rows = [_row(Fields(x, f"rows[{i}]")) for i, x in enumerate(fields.read("rows", sequence))]
        counts = sorted({len(row.losses) for row in rows if row.error is None})
        if len(counts) > 1:
            raise PlanError(f"rows have {counts} losses, expected one for each sequence in all of them")
        if len({row.key for row in rows}) < len(rows):
            raise PlanError("rows has one method twice at one retention")
    except PlanError as error:
        raise KVPolicyError(f"{path} cannot be read as a comparison: {error}; choose another file") from None
    return Comparison(settings, fields.mapping("about"), {row.key: row for row in rows})


def _row(fields: Fields) -> Row:
    losses = fields.read("losses", sequence)
    row = Row(
        method=fields.read("method", text),
        retention=fields.read("retention", number, 0.0, 1.0),
        identity=fields.mapping("identity"),
        uniform=fields.read("uniform", text),
        calibration=fields.mapping("calibration"),
        losses=tuple(number(x, fields.path(f"losses[{i}]"), -_MOST_NATS, _MOST_NATS) for i, x in enumerate(losses)),
        bytes=int(fields.read("bytes", number, 0.0)),  # may be more than `whole` takes
        dense_bytes=int(fields.read("dense_bytes", number, 0.0)),
        entries=int(fields.read("entries", number, 0.0)),
        decode_ms=fields.read("decode_ms", number, 0.0) if fields.has("decode_ms") else None,
        error=fields.read("error", text) if fields.has("error") else None,
        remark=fields.read("remark", text),
        device=fields.read("device", text) if fields.has("device") else "",
    )
    if row.retention == 0:
        raise PlanError(f"{fields.path('retention')} is 0, expected above 0 and at most 1")
    if not row.losses and row.error is None:
        raise PlanError(f"{fields.path('losses')} is empty, and no error says why")
    if row.error is None and not (row.bytes and row.dense_bytes):
        raise PlanError(f"{fields.path('bytes')} or dense_bytes is 0, and no error says why")
    if "tokens" in row.calibration:
        cost = fields.fields("calibration")
        for name in ("tokens", "forwards", "seconds"):
            cost.read(name, number, 0.0)
    return row
