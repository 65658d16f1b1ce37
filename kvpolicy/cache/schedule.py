"""How many entries each KV head may keep once a sequence has grown to n tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from kvpolicy.budget.apportion import apportion
from kvpolicy.budget.plan import BudgetPlan
from kvpolicy.budget.plan_parts import positive, rank_groups
from kvpolicy.defaults import MIN_TOKENS
from kvpolicy.errors import BudgetError
from kvpolicy.model.spec import Budget, Importance, ModelSpec
from kvpolicy.plugins import plugin_call
from kvpolicy.plugins.roles import BudgetAllocator, EvictionPolicy

UNLIMITED = 2**31 - 1
"""The capacity of a KV head that evicts nothing."""

"""Mean entries of a KV head below which a growing budget never goes: short prompts are kept whole."""


class Schedule(Protocol):
    """Capacities as a function of the tokens seen."""

    @property
    def shape(self) -> tuple[int, int]:
        """`(L, H)`."""

    @property
    def evicts(self) -> bool:
        """Whether anything is ever evicted."""

    def total(self, seen: int) -> int:
        """Entries asked for one sequence after `seen` tokens; floors may add to them."""

    def at(self, seen: int, held: Tensor | None) -> Tensor:
        """Capacities after `seen` tokens, int64 `[L, H]`; held: those of now, which never fall, None at first."""

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

    def at(self, seen: int, held: Tensor | None) -> Tensor:
        return self.table

    def with_floor(self, floor: int) -> Fixed:
        if int(self.table.min()) < floor:
            layer, head = (self.table < floor).nonzero()[0].tolist()
            raise BudgetError(
                f"the budget gives {int(self.table[layer, head])} entries to layer {layer}, KV head {head}, expected "
                f"at least {floor}: the policy's sink tokens and one more. Raise the budget or use fewer sink tokens"
            )
        return self


@dataclass(frozen=True, slots=True, eq=False)
class Growing:
    """A fraction of the tokens seen: the total is `round(retention * seen * L * H)`.

    shares:     (retention, context_length) -> `[L, H]`, proportions of the total
    retention:  kept fraction, below 1
    floor:      least entries of a KV head
    min_tokens: least mean entries of a KV head
    groups:     int64 `[L, H]`, see `Budget`
    """

    shape: tuple[int, int]
    shares: Callable[[float, int], Tensor]
    retention: float
    floor: int
    min_tokens: int = MIN_TOKENS
    groups: Tensor | None = None

    evicts: ClassVar[bool] = True

    def total(self, seen: int) -> int:
        layers, heads = self.shape
        return max(round(self.retention * seen * layers * heads), self.min_tokens * layers * heads)

    def at(self, seen: int, held: Tensor | None) -> Tensor:
        context, total = max(seen, self.min_tokens, self.floor), self.total(seen)
        floor = torch.full(self.shape, self.floor) if held is None else held
        shares = self.shares(min(1.0, total / (context * floor.numel())), context)
        return apportion(shares, Budget(total, self.shape, floor, context, groups=self.groups))

    def with_floor(self, floor: int) -> Growing:
        return self if floor <= self.floor else replace(self, floor=floor)


def from_plan(
    plan: BudgetPlan,
    *,
    retention: float | None = None,
    tokens: int | None = None,
    context_length: int | None = None,
    min_tokens: int = MIN_TOKENS,
    tp_size: int = 1,
) -> Schedule:
    """The schedule of a plan. `tokens` or `context_length` fix the capacities up front; else they grow.

    Raises `PlanError` for a retention that the plan does not reach, `BudgetError` for arguments that
    contradict each other.
    """
    shape = plan.model.table_shape
    if tokens is not None and context_length is None:
        context_length = plan.provenance.get("context_length")
        if context_length is None or tokens > context_length:
            raise BudgetError(
                f"tokens={tokens} needs context_length= besides: the plan was made on "
                f"{context_length or 'an unknown number of'} tokens, fewer than are to be kept"
            )
    if retention is None and tokens is None and len(plan.levels) == 1:
        retention = plan.retentions[0]
    if context_length is not None:
        table = plan.capacities(context_length, retention, tokens, tp_size)
        if retention == 1:
            return unlimited(shape)
        layers, heads = shape
        asked = tokens if retention is None else retention * context_length
        return Fixed(table, None if asked is None else round(min(asked, context_length) * layers * heads))
    if retention is None:
        plan.capacities(MIN_TOKENS)  # says which levels there are
        raise BudgetError("retention= is missing")
    plan.shares_at(retention)  # refuses now what it would refuse in the middle of a forward
    if retention == 1:
        return unlimited(shape)
    least, warned = retention, False

    def shares(kept: float, context: int) -> Tensor:
        nonlocal warned
        warned = warned or plan.warn_if_long(context)
        return plan.shares_at(max(kept, least))

    return Growing(
        shape,
        shares,
        retention,
        plan.num_sink_tokens + 1,
        positive("min_tokens", min_tokens),
        rank_groups(*shape, tp_size),
    )


def from_allocator(
    allocator: BudgetAllocator,
    policy: EvictionPolicy,
    spec: ModelSpec,
    *,
    retention: float,
    context_length: int | None = None,
    min_tokens: int = MIN_TOKENS,
    tp_size: int = 1,
) -> Schedule:
    """The schedule of an allocator that needs no importance.

    Raises `BudgetError` for one that does; one that always learns refuses by itself.
    """
    if allocator.needs_importance:
        raise BudgetError(
            f"the allocator {type(allocator).__name__} needs importance that was measured on a model: "
            "run 'kvpolicy tune' with it and give the plan"
        )
    if not 0 < retention <= 1:
        raise BudgetError(f"retention is {retention}, expected above 0 and at most 1")
    shape = spec.table_shape
    if retention == 1:
        return unlimited(shape)
    floor, groups = policy.least_capacity, rank_groups(*shape, tp_size)

    def shares(kept: float, context: int) -> Tensor:
        total = round(kept * context * shape[0] * shape[1])
        budget = Budget(total, shape, min(floor, context), context, groups=groups)
        return plugin_call.shares(allocator, Importance(torch.ones(shape), torch.ones(shape[0])), budget)

    growing = Growing(shape, shares, retention, floor, positive("min_tokens", min_tokens), groups)
    if context_length is None:
        shares(retention, spec.max_context)  # an allocator that has none refuses here, not at the first token
        return growing
    context = positive("context_length", context_length)
    total = spec.total_entries(retention, context)
    budget = Budget(total, shape, min(floor, context), context, groups=groups)
    return Fixed(apportion(shares(retention, context), budget), total)


def unlimited(shape: tuple[int, int]) -> Schedule:
    """Evicts nothing."""
    return Fixed(torch.full(shape, UNLIMITED, dtype=torch.int64))
