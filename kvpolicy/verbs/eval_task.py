"""How well a registered task is answered under a plan, at measured bytes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

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
    name: str,
    plan: BudgetPlan | None,
    policy: tuple[str, EvictionPolicy],
    retentions: Sequence[float],
    *,
    seed: int,
    facts: dict[str, Any],
    progress: Progress,
) -> list[dict[str, Any]]:
    """A row for the full cache, and at each retention for uniform budgets and the plan's, as JSON values.

    name: the plan's, "uniform" or "full";  policy: its name and itself;  facts: that every row has
    """
    (full,) = read_asked([FULL])
    uniform = Method(UNIFORM, *policy, UNIFORM, registry.create("allocator", UNIFORM))
    pairs = [(full, 1.0)]
    if name != FULL:
        own = [] if plan is None else [Method(name, *policy, plan=plan)]
        pairs += [(method, kept) for kept in retentions for method in (uniform, *own)]
    rows = []
    progress.begin("evaluate", len(pairs) * task.steps)
    try:
        for method, kept in pairs:
            begun = time.monotonic()
            measured = task.measure(method, partial(_table, task, method, kept, seed))
            spent = {"seconds": round(time.monotonic() - begun, 2)}
            rows.append(_row(task, method.name, kept, measured, seed) | spent | facts)
            progress.advance(f"{method.name}, {kept:.4g} kept: {task.role.metric} {rows[-1]['score']:.3f}")
    finally:
        progress.end()
    return rows


def _table(task: AnswerTask, method: Method, retention: float, seed: int, context: int) -> Tensor:
    return method.table(task.spec, context, retention, seed, task.dtype)


def _row(task: AnswerTask, plan: str, retention: float, measured: Measured, seed: int) -> dict[str, Any]:
    losses, weight = measured.losses, measured.memory
    low, high = mean_interval(losses, seed)
    return {
        "task": task.name,
        "question": task.question,
        "plan": plan,
        "retention": retention,
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
