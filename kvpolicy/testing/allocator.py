"""The laws of a budget allocator."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kvpolicy.budget.apportion import apportion
from kvpolicy.model.spec import Budget, Importance
from kvpolicy.plugins.activations import LayerStatistics
from kvpolicy.plugins.roles import BudgetAllocator
from kvpolicy.testing.laws import (
    call,
    hold,
    hold_not_negative,
    hold_same,
    hold_tensor,
    hold_unchanged,
    instance_of,
    snapshot,
)
from kvpolicy.testing.suggestions import suggested
from kvpolicy.testing.synthetic import SyntheticProbe

_SHAPE = (3, 2)
_CONTEXT = 64


def check_allocator(allocator: BudgetAllocator | type[BudgetAllocator]) -> None:
    """Checks the laws of `BudgetAllocator`: shares, what `suggest` makes, `fit` and `split` where there is one.

    Shares are checked for the given instance and for what `suggest` makes of the lowest, highest and default values.
    What `fit` learns of a `SyntheticProbe` is checked for the given instance: give one with few steps. Where it has
    learned something, `shares` is not asked. Raises `LawError`, an `AssertionError`.
    """
    instance: BudgetAllocator = instance_of("allocator", allocator)
    learned = type(instance).fit is not BudgetAllocator.fit and _check_fit(instance)
    for candidate in [instance, *suggested(type(instance))]:
        if not learned:
            _check_every_shares(candidate)
        if candidate.split_scope != "none":
            _check_split(candidate)


def _check_every_shares(allocator: BudgetAllocator) -> None:
    for label, importance in _importances(allocator.needs_curves):
        for budget in _budgets():
            case = f"importance {label}, a budget of {budget.total} entries for {_SHAPE} (layers, KV heads)"
            _check_shares(allocator, case, importance, budget)


def _check_fit(allocator: BudgetAllocator) -> bool:
    """Whether something was learned; then it has the laws of shares."""
    probe = SyntheticProbe(num_layers=_SHAPE[0], num_kv_heads=_SHAPE[1])
    learned = False
    for budget in _budgets():
        case = f"a SyntheticProbe and a budget of {budget.total} entries for {_SHAPE} (layers, KV heads)"
        importance = Importance(torch.ones(_SHAPE))
        arguments = [(record, snapshot(record)) for record in (importance, budget)]
        shares = call(allocator, "fit", case, allocator.fit, probe, importance, budget)
        for record, before in arguments:
            hold_unchanged(allocator, "fit", case, record, before)
        if shares is not None:
            learned = True
            _hold_shares(allocator, "fit", case, shares, budget)
            hold_same(allocator, "fit", case, shares, allocator.fit(probe, importance, budget))  # type: ignore[arg-type]
    return learned


def _check_shares(allocator: BudgetAllocator, case: str, importance: Importance, budget: Budget) -> None:
    arguments = [(record, snapshot(record)) for record in (importance, budget)]
    shares = call(allocator, "shares", case, allocator.shares, importance, budget)
    for record, before in arguments:
        hold_unchanged(allocator, "shares", case, record, before)
    _hold_shares(allocator, "shares", case, shares, budget)
    hold_same(allocator, "shares", case, shares, allocator.shares(importance, budget))


def _hold_shares(allocator: BudgetAllocator, what: str, case: str, shares: Tensor, budget: Budget) -> None:
    hold_tensor(allocator, what, case, shares, budget.shape, "[L, H]")
    hold_not_negative(allocator, what, case, shares)
    advice = "give at least one KV head a share; torch.ones(budget.shape) is uniform"
    hold(bool((shares > 0).any()), allocator, f"{what} is not all zero", case, shares, advice)
    met = int(apportion(shares, budget).sum())
    advice = "return plain proportions on one scale; rounding and bounds are apportion's"
    hold(met == budget.total, allocator, f"apportioned shares meet the total {budget.total}", case, met, advice)


def _check_split(allocator: BudgetAllocator) -> None:
    generator = torch.Generator().manual_seed(0)
    (layers, heads), batch = _SHAPE, 2
    every = [torch.rand(batch, heads, 20, generator=generator) for _ in range(layers)]
    for layer in every:
        layer[:, :, :4] = float("inf")  # sink tokens
        layer[:, 0, 15:] = float("-inf")  # absent
    for last in range(layers):
        shown = every[: last + 1] if allocator.split_scope == "model" else every[last : last + 1]
        count = len(shown)
        budget = Budget(total=10 * count * heads, shape=(count, heads), floor=5, ceiling=20)
        case = f"scores [{batch}, {heads}, 20] of {count} layers, +inf for 4 sink tokens, -inf for absent entries"
        scores = [score.clone() for score in shown]
        statistics = _statistics(allocator, batch, count)
        before = [snapshot(item) for item in statistics]
        shares = call(allocator, "split", case, allocator.split, scores, budget, *statistics)
        for item, values in zip(statistics, before, strict=True):
            hold_unchanged(allocator, "split", case, item, values)
        untouched = len(scores) == count and all(map(torch.equal, scores, shown))
        law = "split leaves its arguments unchanged, and changed `scores`"
        hold(untouched, allocator, law, case, scores[0], "work on a copy; avoid methods ending in '_'")
        hold_tensor(allocator, "split", case, shares, (batch, count, heads), "[B, l + 1, H]")
        hold_not_negative(allocator, "split", case, shares)
        positive = bool((shares.flatten(1) > 0).any(1).all())
        advice = "give at least one KV head of each sequence a share"
        hold(positive, allocator, "split is not all zero for a sequence", case, shares, advice)
        hold_same(allocator, "split", case, shares, allocator.split(scores, budget, *statistics))


def _statistics(allocator: BudgetAllocator, batch: int, layers: int) -> list[LayerStatistics]:
    """What the allocator requires of each layer; nothing where it requires none."""
    generator = torch.Generator().manual_seed(1)
    drawn = [
        {name: torch.rand(batch, _SHAPE[1], generator=generator) for name in sorted(allocator.requires)}
        for _ in range(layers)
    ]
    return [LayerStatistics(**values) for values in drawn] if allocator.requires else []


def _importances(curves: bool) -> Iterator[tuple[str, Importance]]:
    for label, importance in _values():
        yield (f"{label}, with curves", _with_curves(importance)) if curves else (label, importance)


def _with_curves(importance: Importance) -> Importance:
    """Curves that fall with the capacity, and a little more so for an important head; one of them is not convex."""
    capacities = torch.tensor([6, 12, 24, _CONTEXT])
    falling = importance.per_head[..., None] / capacities + 2
    falling[0, 0, 1] += 1
    return Importance(importance.per_head, importance.per_layer, falling, capacities)


def _values() -> Iterator[tuple[str, Importance]]:
    generator = torch.Generator().manual_seed(0)
    per_head, per_layer = torch.rand(_SHAPE, generator=generator) + 0.01, torch.rand(3, generator=generator) + 0.01
    zeros, one_hot = per_head.clone(), torch.zeros(_SHAPE)
    zeros[0], zeros[1, 1], one_hot[1, 0] = 0, 0, 1
    yield "of random values with per_layer", Importance(per_head, per_layer)
    yield "of random values without per_layer", Importance(per_head.flip(0))
    yield "of equal values", Importance(torch.full(_SHAPE, 0.5), torch.full((3,), 0.5))
    yield "with zeros, one layer all zero", Importance(zeros, zeros.sum(1))
    yield "zero but for one KV head, without per_layer", Importance(one_hot)
    yield "zero but for one KV head, with per_layer", Importance(one_hot, one_hot.sum(1))


def _budgets() -> list[Budget]:
    floor = torch.arange(5, 11).reshape(_SHAPE)
    return [
        Budget(total=192, shape=_SHAPE, floor=5, ceiling=_CONTEXT),
        Budget(total=38, shape=_SHAPE, floor=5, ceiling=_CONTEXT),
        Budget(total=201, shape=_SHAPE, floor=floor, ceiling=floor + 40),
        Budget(total=6 * _CONTEXT, shape=_SHAPE, floor=5, ceiling=_CONTEXT),
    ]
