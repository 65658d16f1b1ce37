"""The laws that `apportion` promises, each over random budgets, and an oracle that sorts every event."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvpolicy.budget.apportion import apportion
from kvpolicy.errors import BudgetError
from kvpolicy.model.spec import Budget

TINY, HUGE, DENORMAL = 1e-300, 1e300, 5e-324

share_values = st.sampled_from([0.0, 0.25, 1.0, 1.0, 2.0, 1 / 3, TINY, HUGE, DENORMAL, 1e-90]) | st.floats(0, HUGE)
bounds = st.tuples(st.integers(0, 6), st.integers(0, 30)).map(lambda pair: (pair[0], pair[0] + pair[1]))
heads = st.lists(st.tuples(share_values, bounds), min_size=1, max_size=6)
equal_heads = st.tuples(bounds, st.lists(share_values, min_size=1, max_size=6)).map(
    lambda pair: [(share, pair[0]) for share in pair[1]]
)


def row(values: list[Any], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor([values], dtype=dtype)


def solve(
    members: list[tuple[float, tuple[int, int]]],
    total: int,
    cost: list[int] | None = None,
    groups: list[int] | None = None,
) -> list[int]:
    budget = Budget(
        total=total,
        shape=(1, len(members)),
        floor=row([low for _, (low, _) in members]),
        ceiling=row([high for _, (_, high) in members]),
        cost=None if cost is None else row(cost),
        groups=None if groups is None else row(groups),
    )
    result: list[int] = apportion(row([share for share, _ in members], torch.float64), budget)[0].tolist()
    return result


def oracle(members: list[tuple[float, tuple[int, int]]], total: int, cost: list[int]) -> list[int]:
    """Every event of every head in one sorted list; heads of negligible share come last, evenly."""
    peak = max(share for share, _ in members) or 1.0
    events = []
    for index, (share, (low, high)) in enumerate(members):
        weight = share / peak
        for k in range(low, high):
            last = weight <= 1e-100
            events.append((last, (k + 0.5) / (1.0 if last else weight), -share, k, low, high, cost[index], index))
    capacities = [low for _, (low, _) in members]
    left = total - sum(c * price for c, price in zip(capacities, cost, strict=True))
    for event in sorted(events):
        left -= cost[event[-1]]
        if left < 0:
            break
        capacities[event[-1]] += 1
    return capacities


def total_within(data: st.DataObject, members: list[tuple[float, tuple[int, int]]]) -> int:
    return data.draw(st.integers(0, sum(high for _, (_, high) in members)), label="total")


budgets = given(
    members=heads | equal_heads, kept=st.integers(0, 1000), grown=st.integers(0, 1000), turn=st.integers(0, 5)
)


@settings(max_examples=1_000, deadline=None)
@budgets
def test_laws(members: list[tuple[float, tuple[int, int]]], kept: int, grown: int, turn: int) -> None:
    check_laws(members, kept, grown, turn)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None)
@budgets
def test_laws_at_length(members: list[tuple[float, tuple[int, int]]], kept: int, grown: int, turn: int) -> None:
    check_laws(members, kept, grown, turn)


def check_laws(members: list[tuple[float, tuple[int, int]]], kept: int, grown: int, turn: int) -> None:
    most = sum(high for _, (_, high) in members)
    total = most * kept // 1000
    more = total + (most - total) * grown // 1000
    turn %= len(members)
    order = [*range(turn, len(members)), *range(turn)][:: 1 if kept % 2 else -1]
    capacities = solve(members, total)

    floors = [low for _, (low, _) in members]
    assert sum(capacities) == max(total, sum(floors))
    if total <= sum(floors):
        assert capacities == floors
    for capacity, (_, (low, high)) in zip(capacities, members, strict=True):
        assert low <= capacity <= high
    for i, (share, limits) in enumerate(members):
        for j, (other, other_limits) in enumerate(members):
            if limits == other_limits and share >= other:
                assert capacities[i] >= capacities[j] - (share == other)
    assert solve(members, total) == capacities
    assert all(a <= b for a, b in zip(capacities, solve(members, more), strict=True))
    permuted = solve([members[index] for index in order], total)
    given_to = sorted((members[i], c) for i, c in enumerate(capacities))
    assert sorted((members[i], c) for i, c in zip(order, permuted, strict=True)) == given_to


@settings(max_examples=2_000, deadline=None)
@given(members=heads, data=st.data())
def test_agrees_with_sorting_every_event(members: list[tuple[float, tuple[int, int]]], data: st.DataObject) -> None:
    total = total_within(data, members)
    assert solve(members, total) == oracle(members, total, [1] * len(members))


@settings(max_examples=1_000, deadline=None)
@given(members=heads, data=st.data())
def test_costs_take_the_longest_prefix(members: list[tuple[float, tuple[int, int]]], data: st.DataObject) -> None:
    cost = data.draw(st.lists(st.integers(1, 9), min_size=len(members), max_size=len(members)))
    full = sum(high * price for (_, (_, high)), price in zip(members, cost, strict=True))
    total = data.draw(st.integers(0, full))
    assert solve(members, total, cost=cost) == oracle(members, total, cost)


@settings(max_examples=500, deadline=None)
@given(
    shares=st.lists(share_values, min_size=8, max_size=8),
    owners=st.lists(st.sampled_from([0, 3, 7]), min_size=8, max_size=8),
    data=st.data(),
)
def test_each_group_gets_its_exact_part(shares: list[float], owners: list[int], data: st.DataObject) -> None:
    names = sorted(set(owners))
    smallest = min(owners.count(name) for name in names)
    total = data.draw(st.integers(0, 20 * smallest * len(names)))
    members = [(share, (1, 20)) for share in shares]
    capacities = solve(members, total, groups=owners)
    for rank, name in enumerate(names):
        part = total // len(names) + (rank < total % len(names))
        own = [c for c, owner in zip(capacities, owners, strict=True) if owner == name]
        assert sum(own) == max(part, len(own))
        assert own == solve([m for m, owner in zip(members, owners, strict=True) if owner == name], part)


@settings(max_examples=500, deadline=None)
@given(
    shares=st.lists(st.floats(0, 1), min_size=6, max_size=6),
    context=st.integers(10_000, 10_000_000),
    kept=st.floats(0, 1),
)
@example(shares=[1.0] * 6, context=10_000_000, kept=1 - 1e-9)
@example(shares=[1.0, 1 - 1e-16, 1 - 1e-15, 1.0, 1.0, 1.0], context=10_000_000, kept=0.3)
def test_large_contexts_keep_the_laws(shares: list[float], context: int, kept: float) -> None:
    members = [(share, (5, context)) for share in shares]
    total = round(kept * 6 * context)
    capacities, following = solve(members, total), solve(members, min(total + 1, 6 * context))
    assert sum(capacities) == max(total, 30)
    assert all(0 <= b - a <= 1 for a, b in zip(capacities, following, strict=True))
    pairs = sorted(zip(shares, capacities, strict=True))
    assert all(b[1] >= a[1] - (a[0] == b[0]) for a, b in pairwise(pairs))


def test_growing_one_entry_at_a_time_takes_nothing_back() -> None:
    members = [(share, (1, 40)) for share in (0.5, 0.3, 0.3, 1 / 3, 0.0, 1e-120, TINY)]
    before = solve(members, 7)
    for total in range(8, 281):
        after = solve(members, total)
        assert sum(after) == total
        assert (
            sum(b - a for a, b in zip(before, after, strict=True))
            == 1
            == sum(b != a for a, b in zip(before, after, strict=True))
        )
        before = after


@pytest.mark.parametrize(
    ("shares", "total", "expected"),
    [
        ([53.0, 24.0, 23.0], 7, [3, 2, 2]),  # Sainte-Lague's textbook election
        ([1.0, 1.0, 1.0], 4, [2, 1, 1]),  # ties by index
        ([1.0, 0.0, 0.0], 6, [6, 0, 0]),
        ([1.0, 0.0, 0.0], 15, [10, 3, 2]),  # no share: only when the others are full, and evenly
        ([0.0, 0.0, 0.0], 7, [3, 2, 2]),
        ([TINY, 2 * TINY, TINY], 4, [1, 2, 1]),
        ([HUGE, 2 * HUGE, HUGE], 4, [1, 2, 1]),
        ([DENORMAL, 2 * DENORMAL, DENORMAL], 4, [1, 2, 1]),
        ([HUGE, TINY, 0.0], 11, [10, 1, 0]),  # negligible beside the largest, yet before zero
        ([1.0, 2.0, 3.0], 0, [0, 0, 0]),
        ([1.0, 2.0, 3.0], 30, [10, 10, 10]),
    ],
)
def test_known_cases(shares: list[float], total: int, expected: list[int]) -> None:
    assert solve([(share, (0, 10)) for share in shares], total) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int64])
def test_any_dtype_of_shares(dtype: torch.dtype) -> None:
    shares = torch.tensor([[1, 2], [3, 4]], dtype=dtype)
    assert apportion(shares, Budget(20, (2, 2), 0, 20)).tolist() == [[2, 4], [6, 8]]
    assert shares.tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize("kind", ["equal", "random", "lognormal", "wild"])
def test_a_large_model_is_quick(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    exponent = torch.randn(32, 8, generator=generator, dtype=torch.float64)
    scale = {"equal": 0.0, "random": 0.3, "lognormal": 2.0, "wild": 200.0}[kind]
    budget = Budget(round(0.3 * 131072 * 256), (32, 8), 5, 131072)
    apportion(exponent.exp(), budget)
    start = time.perf_counter()
    capacities = apportion((scale * exponent).clamp(-690, 690).exp(), budget)
    assert time.perf_counter() - start < 0.5
    assert int(capacities.sum()) == budget.total


@pytest.mark.parametrize(
    ("shares", "budget", "message"),
    [
        (torch.ones(2, 3), Budget(4, (2, 2), 0, 4), r"shares have shape \(2, 3\), expected .* \(2, 2\)"),
        (torch.tensor([[1.0, -1.0]]), Budget(4, (1, 2), 0, 4), "layer 0, KV head 1 is -1.0"),
        (torch.tensor([[1.0, float("nan")]]), Budget(4, (1, 2), 0, 4), "layer 0, KV head 1 is nan"),
        (torch.tensor([[float("inf"), 1.0]]), Budget(4, (1, 2), 0, 4), "layer 0, KV head 0 is inf"),
        (torch.ones(1, 2), Budget(9, (1, 2), 0, 4), "above the sum of the ceilings, 8"),
        (torch.ones(1, 2), Budget(4, (1, 2), 0, 4, cost=torch.tensor([[1, 0]])), "cost .* at least 1, got 0"),
    ],
)
def test_refused(shares: Tensor, budget: Budget, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        apportion(shares, budget)
