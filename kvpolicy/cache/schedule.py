"""How many entries each KV head may keep once a sequence has grown to n tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from kvpolicy.budget.ask import Ask
from kvpolicy.budget.entries import (
    capacities,
    check_unmeasured,
    context_budget,
    rank_groups,
    unmeasured_capacities,
    unmeasured_shares,
)
from kvpolicy.budget.plan import BudgetPlan
from kvpolicy.errors import BudgetError
from kvpolicy.model.spec import Budget, ModelSpec, total_entries
from kvpolicy.plugins.roles import BudgetAllocator, EvictionPolicy

UNLIMITED = 2**31 - 1
"""The capacity of a KV head that evicts nothing."""


class Schedule(Protocol):
    """Capacities as a function of the tokens seen."""

    @property
    def shape(self) -> tuple[int, int]:
        """`(L, H)`."""

    @property
    def evicts(self) -> bool:
        """Whether anything is ever evicted."""

    @property
    def grows(self) -> bool:
        """Whether capacities rise with the tokens seen."""

    def total(self, seen: int) -> int:
        """Entries asked for one sequence after `seen` tokens; floors may add to them."""

    def at(self, seen: int, before: Tensor | None) -> Tensor:
        """Capacities after `seen` tokens, int64 `[L, H]`; before: those until now, which never fall, None at first."""

    def with_floor(self, floor: int) -> Schedule:
        """The same with at least `floor` entries for each KV head. Raises `BudgetError` where that cannot be."""


@dataclass(frozen=True, slots=True, eq=False)
class Fixed:
    """The same capacities from the first token on.

    table: int64 `[L, H]`
    asked: entries that were asked for, None for the table's own sum

    Raises `BudgetError` for a table that is none.
    """

    table: Tensor
    asked: int | None = None

    grows: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.table.dim() != 2 or self.table.dtype == torch.bool or self.table.is_floating_point():
            raise BudgetError(
                f"capacities must be whole numbers [layers, KV heads], got {self.table.dtype} {list(self.table.shape)}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.table.shape[0]), int(self.table.shape[1])

    @property
    def evicts(self) -> bool:
        return bool((self.table < UNLIMITED).any())

    def total(self, seen: int) -> int:
        return int(self.table.sum()) if self.asked is None else self.asked

    def at(self, seen: int, before: Tensor | None) -> Tensor:
        return self.table

    def with_floor(self, floor: int) -> Fixed:
        if int(self.table.min()) < floor:
            layer, head = (self.table < floor).nonzero()[0].tolist()
            raise BudgetError(
                f"the budget gives {int(self.table[layer, head])} entries to layer {layer}, KV head {head}, expected "
                f"at least {floor}: the policy's sink tokens, and one more or those that a format leaves exact. Raise "
                "the budget"
            )
        return self


@dataclass(frozen=True, slots=True, eq=False)
class ByLength:
    """Prompts of several lengths in one batch: each has the capacities of its own length from then on.

    tables: int64 `[L, H]` by the tokens of a prompt

    Raises `BudgetError` for a table that is none.
    """

    tables: Mapping[int, Tensor]
    evicts: ClassVar[bool] = True
    grows: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for table in self.tables.values():
            Fixed(table)

    @property
    def shape(self) -> tuple[int, int]:
        return Fixed(next(iter(self.tables.values()))).shape

    def total(self, seen: int) -> int:
        """That of the longest prompt that has as many tokens at most."""
        return int(self.tables[max(length for length in self.tables if length <= seen)].sum())

    def at(self, seen: int, before: Tensor | None) -> Tensor:
        return self.tables[seen] if before is None else before

    def with_floor(self, floor: int) -> ByLength:
        for table in self.tables.values():
            Fixed(table).with_floor(floor)
        return self


@dataclass(frozen=True, slots=True, eq=False)
class Growing:
    """A fraction of the tokens seen, and short contexts whole (`Ask.min_tokens`).

    shares: (fraction that is kept, context_length) -> `[L, H]`, proportions of the total
    ask:    a retention below 1
    floor:  least entries of a KV head
    groups: int64 `[L, H]`, see `Budget`
    """

    shape: tuple[int, int]
    shares: Callable[[float, int], Tensor]
    ask: Ask
    floor: int
    groups: Tensor | None = None

    evicts: ClassVar[bool] = True
    grows: ClassVar[bool] = True

    def total(self, seen: int) -> int:
        return self.ask.total(max(seen, self.ask.min_tokens), self.shape)

    def at(self, seen: int, before: Tensor | None) -> Tensor:
        context = max(seen, self.ask.min_tokens, self.floor)
        shares = self.shares(self.ask.fraction(context), context)
        return capacities(
            shares, self.ask.total(context, self.shape), context, self.floor if before is None else before, self.groups
        )

    def with_floor(self, floor: int) -> Growing:
        return self if floor <= self.floor else replace(self, floor=floor)


def from_plan(plan: BudgetPlan, ask: Ask, tp_size: int = 1, least: int = 0) -> Schedule:
    """The schedule of a plan. `tokens` or `context_length` fix the capacities up front; else they grow.

    least: fewest entries of a KV head, where the plan's own policy could do with fewer

    Raises `PlanError` for a retention that the plan does not reach, `BudgetError` for arguments that
    contradict each other.
    """
    ask, shape = plan.completed(ask), plan.model.table_shape
    if (context := ask.context_length) is not None:
        table, total = plan.capacities(context, ask.retention, ask.tokens, tp_size), ask.total(context, shape)
        if least > plan.least_capacity:  # those above it give what those below it get
            table = capacities(table.double(), total, context, least, rank_groups(*shape, tp_size))
        return unlimited(shape) if ask.retention == 1 else Fixed(table, total)
    assert ask.retention is not None  # an ask that is completed has one, or tokens and their context
    plan.shares_at(ask.retention)  # refuses now what it would refuse in the middle of a forward
    if ask.retention == 1:
        return unlimited(shape)
    warned = False

    def shares(kept: float, context: int) -> Tensor:
        nonlocal warned
        warned = warned or plan.warn_if_long(context)
        return plan.shares_at(kept)

    return Growing(shape, shares, ask, max(plan.least_capacity, least), rank_groups(*shape, tp_size))


def from_allocator(
    allocator: BudgetAllocator, policy: EvictionPolicy, spec: ModelSpec, ask: Ask, tp_size: int = 1, least: int = 0
) -> Schedule:
    """The schedule of an allocator that needs no importance. least: as in `from_plan`

    Raises `BudgetError` for one that does, and for an ask without a retention; one that always learns refuses by
    itself.
    """
    check_unmeasured(allocator)
    retention, context, shape = ask.own_retention(), ask.context_length, spec.table_shape
    if retention == 1:
        return unlimited(shape)
    floor, groups = max(policy.least_capacity, least), rank_groups(*shape, tp_size)

    def budget(kept: float, context: int) -> Budget:
        return context_budget(total_entries(kept, context, shape), shape, context, floor, groups)

    def shares(kept: float, context: int) -> Tensor:
        return unmeasured_shares(allocator, budget(kept, context))

    if context is None:
        shares(retention, spec.max_context)  # an allocator that has none refuses here, not at the first token
        return Growing(shape, shares, ask, floor, groups)
    return Fixed(unmeasured_capacities(allocator, budget(retention, context)), ask.total(context, shape))


def unlimited(shape: tuple[int, int]) -> Schedule:
    """Evicts nothing."""
    return Fixed(torch.full(shape, UNLIMITED, dtype=torch.int64))
