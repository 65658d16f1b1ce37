"""How well a registered task is answered under a plan, at measured bytes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from kvpolicy.budget.entry_format import Format, name_of
from kvpolicy.budget.plan import BudgetPlan
from kvpolicy.comparison.answers import AnswerTask
from kvpolicy.comparison.methods import FULL, UNIFORM, Method, read_asked
from kvpolicy.comparison.task import Measured
from kvpolicy.measure.stats import mean_interval
from kvpolicy.plugins.registry import registry
from kvpolicy.plugins.roles import EvictionPolicy
from kvpolicy.plugins.task_role import Sample
from kvpolicy.progress import Progress
from kvpolicy.verbs.chosen_task import versions


def answer_rows(
    task: AnswerTask,
    plan: BudgetPlan | None,
    policy: tuple[str, EvictionPolicy],
    pairs: Sequence[tuple[str, float, Format]],
    *,
    seed: int,
    facts: dict[str, Any],
    progress: Progress,
) -> list[dict[str, Any]]:
    """A row for each pair, as JSON values.

    pairs:  "full", "uniform" or the plan's name, what is kept, and the format of the entries
    policy: its name and itself;  facts: that every row has
    """
    rows = []
    progress.begin("evaluate", len(pairs) * task.steps)
    try:
        for name, kept, entry_format in pairs:
            shared, begun = {} if plan is None or name == FULL else plan.shared_layers, time.monotonic()
            method = replace(_method(name, plan, policy), entry_format=entry_format, shared_layers=shared)
            measured = task.measure(method, partial(_table, task, method, kept, seed))
            spent = {"seconds": round(time.monotonic() - begun, 2)}
            rows.append(_row(task, method, kept, measured, seed) | spent | facts)
            progress.advance(f"{method.name}, {kept:.4g} kept: {task.role.metric} {rows[-1]['score']:.3f}")
    finally:
        progress.end()
    return rows


def _method(name: str, plan: BudgetPlan | None, policy: tuple[str, EvictionPolicy]) -> Method:
    if name == FULL:
        return read_asked([FULL])[0]
    if name == UNIFORM:
        return Method(UNIFORM, *policy, UNIFORM, registry.create("allocator", UNIFORM))
    return Method(name, *policy, plan=plan)


def _table(task: AnswerTask, method: Method, retention: float, seed: int, context: int) -> Tensor:
    if method.entry_format is not None:
        return method.kept_table(task.spec, context, retention)  # a retention is of entries here, not of bytes
    if method.shared_layers:  # it is one of the layers that keep entries, and there one of all
        retention *= 1 - len(method.shared_layers) / task.spec.num_budgeted_layers
    return method.table(task.spec, context, retention, seed, task.dtype)


def _row(task: AnswerTask, method: Method, retention: float, measured: Measured, seed: int) -> dict[str, Any]:
    losses, weight = measured.losses, measured.memory
    low, high = mean_interval(losses, seed)
    return {
        "task": task.name,
        "question": task.question,
        "plan": method.name,
        "retention": retention,
        "format": name_of(method.entry_format),
        "metric": task.role.metric,
        "score": 1 - float(losses.mean()),
        task.role.metric: 1 - float(losses.mean()),
        "interval": [1 - high, 1 - low],
        "n": len(losses),
        "turns": sum(len(sample.turns) for sample in task.samples),
        "seed": seed,
        "bytes": weight.bytes,
        "dense_bytes": weight.dense_bytes,
        "entries": weight.entries,
        "protocol": task.protocol,
        "versions": versions(),
    } | _grid(task.samples, losses)


def _grid(samples: Sequence[Sample], losses: Tensor) -> dict[str, Any]:
    """The mean score of each depth and length, where the samples name theirs."""
    if not name_places(samples):
        return {}
    cells: dict[tuple[float, int], list[float]] = {}
    for sample, loss in zip(samples, losses.tolist(), strict=True):
        cells.setdefault((sample.about["depth"], sample.about["length"]), []).append(1 - loss)
    grid = [
        {"depth": depth, "length": length, "score": sum(scores) / len(scores), "n": len(scores)}
        for (depth, length), scores in sorted(cells.items())
    ]
    return {"grid": grid}


def name_places(samples: Sequence[Sample]) -> bool:
    """Whether samples say at which depth of how long a prompt stands what is asked for."""
    return all({"depth", "length"} <= sample.about.keys() for sample in samples)
