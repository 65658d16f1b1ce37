"""The one rule from a total of entries to those of each KV head."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpolicy.budget.apportion import apportion
from kvpolicy.budget.plan_parts import positive
from kvpolicy.errors import BudgetError
from kvpolicy.model.spec import Budget, Importance
from kvpolicy.plugins import plugin_call
from kvpolicy.plugins.roles import BudgetAllocator


def context_budget(
    total: int, shape: tuple[int, int], context: int, least: int | Tensor, groups: Tensor | None = None
) -> Budget:
    """The budget of one sequence of `context` tokens, of which each KV head keeps `context` at most.

    least: the fewest entries of a KV head, as far as the context reaches; where they exceed the total, they are it.
        Or int64 `[L, H]`, the capacities that have been allowed already
    groups: as for `Budget`
    """
    if isinstance(least, Tensor):
        return Budget(total, shape, least, context, groups=groups)
    floor = min(least, context)
    return Budget(max(total, floor * shape[0] * shape[1]), shape, floor, context, groups=groups)


def capacities(shares: Tensor, total: int, context: int, least: int | Tensor, groups: Tensor | None = None) -> Tensor:
    """Entries each KV head may keep of `context` tokens, int64 `[L, H]`, under `context_budget`.

    shares: `[L, H]`, proportions of the total
    """
    layers, heads = shares.shape
    return apportion(shares, context_budget(total, (layers, heads), context, least, groups))


def check_unmeasured(allocator: BudgetAllocator) -> None:
    """Raises `BudgetError` for an allocator that needs importance. One that always learns refuses by itself."""
    if allocator.needs_importance:
        raise BudgetError(
            f"the allocator {type(allocator).__name__} needs importance that was measured on a model: "
            "run 'kvpolicy tune' with it and give the plan"
        )


def unmeasured_shares(allocator: BudgetAllocator, budget: Budget) -> Tensor:
    """The shares `[L, H]` of an allocator that needs no importance: to it, all KV heads matter alike."""
    check_unmeasured(allocator)
    alike = Importance(torch.ones(budget.shape), torch.ones(budget.shape[0]))
    return plugin_call.shares(allocator, alike, budget)


def unmeasured_capacities(allocator: BudgetAllocator, budget: Budget) -> Tensor:
    """Entries each KV head may keep as such an allocator splits the budget, int64 `[L, H]`. Raises `BudgetError`."""
    return apportion(unmeasured_shares(allocator, budget), budget)


def rank_groups(layers: int, heads: int, tp_size: int) -> Tensor | None:
    """int64 `[L, H]`, the rank that owns each KV head; None for one rank."""
    tp_size = positive("tp_size", tp_size)
    if heads % tp_size:
        raise BudgetError(
            f"tp_size is {tp_size}, expected a divisor of the model's {heads} KV heads: "
            "every rank owns the same number of them"
        )
    if tp_size == 1:
        return None
    return torch.arange(heads).div(heads // tp_size, rounding_mode="floor").expand(layers, heads)
