"""How many entries go into so many bytes, with everything that a cache holds besides them counted."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvpolicy.budget.entries import capacities
from kvpolicy.budget.entry_format import Format, least_entries, name_of
from kvpolicy.budget.plan import BudgetPlan
from kvpolicy.budget.plan_parts import PlanLevel
from kvpolicy.cache.arena import LayerArena
from kvpolicy.cache.layer import StoreLayer
from kvpolicy.cache.select import Protection
from kvpolicy.cache.size import block_nbytes, entry_costs
from kvpolicy.errors import BudgetError, PlanError
from kvpolicy.model.spec import Budget, ModelSpec
from kvpolicy.plugins.roles import EvictionPolicy

_STEP_NBYTES = 7 * torch.int64.itemsize + torch.float32.itemsize  # of a KV head, while a token is decoded: `LayerStep`
_EVICTED_NBYTES = torch.int64.itemsize  # of a layer, likewise: `LayerStep.evicted_at`


def table_nbytes(spec: ModelSpec, capacities: Tensor, batch_size: int = 1) -> int:
    """What a store holds that is no entry: the tables of its layers, each sequence's part of them the same, and the
    capacities, which sequences of one length share. How many tokens a sequence has seen is one number for all layers,
    and as many of them are settled.
    """
    shape, count, layers = spec.attention, spec.num_kv_heads, spec.num_budgeted_layers
    arena = LayerArena(
        count, shape.key_dim, shape.value_dim, torch.float32, torch.device("cpu"), num_pinned=0, scored=False
    )
    empty = StoreLayer(0, arena, 1, count, Protection(), scores_stay=True)
    of_layer = sum(tensor.nbytes for tensor in empty.tensors.values())
    seen, settled = empty.seen.nbytes, empty.settled.nbytes
    return batch_size * (layers * (of_layer - seen - settled) + seen) + capacities.nbytes


def byte_budget(
    memory: int | float,
    spec: ModelSpec,
    context: int,
    dtype: torch.dtype,
    policy: EvictionPolicy,
    entry_format: Format,
    *,
    scored: bool,
) -> Budget:
    """The budget, in bytes, of the entries of one sequence of `context` tokens: what is left for them of `memory`.

    memory: bytes, or as a float up to 1 the part of the full cache's bytes in `dtype`. Keys, values, positions, scores,
        tables and what stays exact are counted

    Raises `BudgetError` where not even the fewest entries of each KV head go into them.
    """
    full = spec.total_entries(1.0, context) * spec.entry_bytes(dtype.itemsize)
    allowed = round(memory * full) if isinstance(memory, float) else memory
    beside = table_nbytes(spec, torch.empty(spec.table_shape, dtype=torch.int64))
    flags = policy.rescores * spec.num_budgeted_layers * torch.bool.itemsize  # whether a decoded token's score was NaN
    beside += block_nbytes(spec, dtype.itemsize, policy, entry_format) + flags
    beside += spec.total_entries(1.0, 1) * _STEP_NBYTES + spec.num_budgeted_layers * _EVICTED_NBYTES
    cost = entry_costs(spec, dtype, scored=scored, entry_format=entry_format)
    least = min(least_entries(policy, entry_format), context)
    if allowed - beside < least * int(cost.sum()):
        raise BudgetError(
            f"memory={memory} is {allowed} bytes for {context} tokens, but the fewest entries that the KV heads can be "
            f"given in format={name_of(entry_format)} take {least * int(cost.sum()) + beside}: give more, or another "
            "format"
        )
    total = min(allowed - beside, int(cost.sum()) * context)
    return Budget(total, spec.table_shape, least, context, cost)


def even_retention(budget: Budget) -> float:
    """The kept part of a context under a budget in bytes whose entries all take the same."""
    assert budget.cost is not None  # in bytes
    return budget.total // int(budget.cost[0, 0]) / int(budget.ceilings().sum())


def plan_retention(
    plan: BudgetPlan,
    context: int,
    budget_of: Callable[[Format], Budget],
    format_of_level: Callable[[PlanLevel], Format] = lambda level: level.entry_format,
) -> float:
    """The largest retention whose capacities go into a budget in bytes, of a plan whose levels may differ in formats:
    that under the format of the highest level that goes into them.

    budget_of: raises `BudgetError` for a format of which even the fewest entries are too many

    Raises `PlanError` where not even the plan's lowest level goes into the bytes.
    """
    levels = sorted(plan.levels, key=lambda level: -level.retention)
    full = context * plan.model.table_shape[0] * plan.model.table_shape[1]
    kept, most = 0, full
    for level in levels:
        least = round(level.retention * full)
        try:
            kept = _most_entries(plan, context, budget_of(format_of_level(level)), level.retention, most)
        except BudgetError:
            if level is levels[-1]:
                raise
        if kept >= least:
            return max(kept / full, level.retention)
        most = least - 1
    raise PlanError(
        f"of {context} tokens {kept / full:.2g} of the entries go into these bytes, which is below the plan's "
        f"lowest level, {levels[-1].retention:g}: give more bytes, or tune a plan for fewer"
    )


def _most_entries(plan: BudgetPlan, context: int, budget: Budget, lowest: float, most: int) -> int:
    """Of the entries of a retention to `most` in all, the most that go into the budget; fewer where not even those of
    the retention do. Rounded down to whole entries they are still that retention's.
    """
    assert budget.cost is not None  # in bytes
    full, cost = int(budget.ceilings().sum()), budget.cost
    least = round(lowest * full)

    def spent(entries: int) -> int:
        table = capacities(plan.shares_at(max(entries / full, lowest)), entries, context, int(budget.floors().max()))
        return int((table * cost).sum())

    if (smallest := spent(least)) > budget.total:
        return min(least * budget.total // smallest, least - 1)
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if spent(middle) <= budget.total else (least, middle - 1)
    return least
