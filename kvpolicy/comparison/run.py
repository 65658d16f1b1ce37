"""Measuring every method at every retention, one row after another, into a file that can be continued."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvpolicy.comparison.methods import Method
from kvpolicy.comparison.quality import summary
from kvpolicy.comparison.results_file import Comparison, Row, load_comparison, save_comparison
from kvpolicy.comparison.task import Task
from kvpolicy.errors import KVPolicyError, ModelError
from kvpolicy.measure.machine import device_name
from kvpolicy.progress import Progress


def compare(
    task: Task,
    methods: Sequence[Method],
    retentions: Sequence[float],
    out: Path,
    *,
    seed: int = 0,
    settings: dict[str, Any] | None = None,
    about: dict[str, Any] | None = None,
    timing: bool = True,
    progress: Progress | None = None,
) -> Comparison:
    """Every method at every retention. The file at `out` is written after each row, and rows it has are not measured
    again; those that failed are.

    methods:    as `read_methods` gives them, controls included
    retentions: kept fractions of the prompt, each in (0, 1)
    settings:   what must agree besides the task's own and the seed, as JSON values
    about:      names for a reader
    timing:     whether decoding is timed, of which nothing can be told while others use the device; rows that were
                measured on another device are measured again then

    A method that fails is a row that says why. Raises `KVPolicyError` for a file made under other settings, and what
    `full` raises: without it there is nothing to compare with.
    """
    progress = progress or Progress()
    all_settings = {**task.settings, "seed": seed, **(settings or {})}
    before = _begun(out, all_settings)
    done = Comparison(all_settings, about or {})
    pairs = [(m, r) for m in methods for r in ([1.0] if m.evicts_nothing else sorted(set(retentions), reverse=True))]
    device = device_name(task.model.device)
    timed_on = device if timing else None
    missing = sum(_known(before, *pair, timed_on) is None for pair in pairs)
    progress.note(f"{missing} rows of {task.count} sequences to measure, {len(pairs) - missing} are in {out} already")
    progress.begin("compare", missing * task.steps)
    try:
        for method, retention in pairs:
            row = _known(before, method, retention, timed_on)
            if row is None:
                row = replace(_measured(task, method, retention, seed, timing), device=device)
                progress.advance(f"{method.name}, {retention:.4g} kept: {_outcome(row)}")
            before.pop(row.key, None)
            done.rows[row.key] = row
            _save(replace(done, rows=done.rows | before), out)
    finally:
        progress.end()
    return replace(done, rows=done.rows | before)


def _begun(out: Path, settings: dict[str, Any]) -> dict[tuple[str, float], Row]:
    """The rows of an earlier run, if there was one. Raises `KVPolicyError` where it had other settings."""
    if not out.exists():
        return {}
    earlier = load_comparison(out)
    names = sorted(earlier.settings.keys() | settings.keys())
    other = [name for name in names if earlier.settings.get(name) != settings.get(name)]
    if other:
        changes = ", ".join(f"{name} was {earlier.settings.get(name)}, now {settings.get(name)}" for name in other)
        raise KVPolicyError(f"{out} was made under other settings ({changes}): choose another file")
    return dict(earlier.rows)


def _known(rows: dict[tuple[str, float], Row], method: Method, retention: float, timed_on: str | None) -> Row | None:
    """A row that need not be measured again. timed_on: the device that times are wanted of, if they are."""
    row = rows.get((method.name, retention))
    if row is None or row.error is not None or row.identity != method.identity:
        return None
    return None if timed_on is not None and (row.decode_ms is None or row.device != timed_on) else row


def _measured(task: Task, method: Method, retention: float, seed: int, timing: bool) -> Row:
    row = Row(method.name, retention, method.identity, method.uniform_name, remark=method.remark)
    try:
        row = replace(row, calibration=method.calibration(retention))
        method = method.at(task.spec, task.context, retention, task.dtype)
        tables = partial(_table, task, method, retention, seed)
        measured = task.measure(method, tables)
        if not bool(torch.isfinite(measured.losses).all()):
            raise ModelError("the loss is not finite: try another dtype")
        took = task.decode_ms(method, tables(task.context)) if timing else None
    except Exception as error:  # a plugin may raise anything
        if method.is_full:
            raise
        return replace(row, error=" ".join(_reason(error).split()))
    memory = measured.memory
    return replace(
        row,
        losses=tuple(measured.losses.tolist()),
        bytes=memory.bytes,
        dense_bytes=memory.dense_bytes,
        entries=memory.entries,
        decode_ms=took,
    )


def _table(task: Task, method: Method, retention: float, seed: int, context: int) -> Tensor:
    return method.table(task.spec, context, retention, seed, task.dtype)


def _reason(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):  # whose own message is a page
        return "out of memory on the device: try a smaller batch"
    return str(error) if isinstance(error, KVPolicyError) else f"{type(error).__name__}: {error}"


def _outcome(row: Row) -> str:
    return f"failed: {row.error}" if row.error else f"loss {sum(row.losses) / len(row.losses):.4f}"


def _save(comparison: Comparison, out: Path) -> None:
    save_comparison(comparison, out, {"summary": summary(comparison)})
