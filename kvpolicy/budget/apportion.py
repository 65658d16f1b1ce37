"""Shares to exact integers: `capacity = clip(round(lambda * share), floor, ceiling)` with the total met exactly.

This is the divisor method with rounding at one half (Webster, Sainte-Lague) under bounds. Each entry above the
floors is an event: KV head i goes from k to k + 1 entries at `lambda = (k + 0.5) / share_i`. The first
`total - sum(floor)` events in the order (lambda, larger share, floor, ceiling, cost, index) are taken. Taking a prefix
of one fixed order gives the laws:

- the total is exact, and floor <= capacity <= ceiling;
- under equal bounds, share_i >= share_j gives capacity_i >= capacity_j, up to one entry between equal shares;
- a larger total never lowers a capacity (largest-remainder rounding would break this);
- permuting the KV heads (with their bounds) permutes the multiset of capacities with them;
- the same input gives the same output.

Bisection finds a narrow window of lambda, so that only the few events inside it are sorted. It is numpy's: a prompt
waits for some hundred operations on a few numbers, of which each takes torch several times as long.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvpolicy.errors import BudgetError
from kvpolicy.model.spec import Budget

Counts = NDArray[np.int64]
Numbers = NDArray[np.float64]

_NEGLIGIBLE = 1e-100  # of the largest share: treated as zero, so that lambda stays in float64's range
_MOST = 2.0**62  # a count that int64 holds
_FEW_HEADS = 64
_MARGIN = 1e-9  # relative width of the window that is sorted; far above float64's rounding of (k + 0.5) / share


def apportion(shares: Tensor, budget: Budget) -> Tensor:
    """Capacities, int64 `[L, H]`, proportional to `shares` within the budget's bounds.

    shares: `[L, H]`, finite, >= 0; only proportions count. Heads whose share is zero get more than their floor
        only when all others are at their ceiling, and then evenly.
    With `budget.cost` None the capacities of each group sum exactly to its part of the total: groups split the
    total evenly, the first ones get one more when it does not divide. With costs, the largest total cost that
    a prefix of the events reaches without exceeding the budget.
    Where the floors exceed the total, the floors are returned: callers report it (`sum > budget.total`).

    Raises `BudgetError` for shares of the wrong shape or value, and for a total above the ceilings.
    """
    _check_shares(shares, budget)
    flat = shares.detach().to("cpu", torch.float64).flatten().numpy()
    floor, ceiling = (bounds.flatten().numpy() for bounds in (budget.floors(), budget.ceilings()))
    cost, groups = _flat(budget.cost, np.ones_like(floor)), _flat(budget.groups, np.zeros_like(floor))
    capacities, names = floor.copy(), np.unique(groups)
    for rank, name in enumerate(names):
        (members,) = np.nonzero(groups == name)
        part = budget.total // len(names) + (rank < budget.total % len(names))
        capacities[members] = _apportion_group(flat[members], floor[members], ceiling[members], cost[members], part)
    return torch.from_numpy(capacities).reshape(budget.shape)


def _flat(table: Tensor | None, default: Counts) -> Counts:
    return default if table is None else table.to("cpu", torch.int64).flatten().numpy()


def _check_shares(shares: Tensor, budget: Budget) -> None:
    if tuple(shares.shape) != budget.shape:
        raise BudgetError(f"shares have shape {tuple(shares.shape)}, expected (layers, KV heads) = {budget.shape}")
    bad = ~((shares >= 0) & (shares < torch.inf))  # of NaN neither holds
    if bool(bad.any()):
        index = bad.nonzero()[0].tolist()
        raise BudgetError(
            f"shares must be finite and >= 0; layer {index[0]}, KV head {index[1]} is {float(shares[tuple(index)])}"
        )
    if budget.cost is not None and int(budget.cost.min()) < 1:
        raise BudgetError(f"the cost of an entry must be at least 1, got {int(budget.cost.min())}")


def _apportion_group(shares: Numbers, floor: Counts, ceiling: Counts, cost: Counts, total: int) -> Counts:
    """One group, everything `[n]`. First the heads with a share, then, if something is left, the others evenly."""
    left = total - int((floor * cost).sum())
    if left <= 0:
        return floor
    room = (ceiling - floor) * cost
    if left > int(room.sum()):
        raise BudgetError(
            f"a budget of {total} entries is above the sum of the ceilings, {int((ceiling * cost).sum())}: "
            "lower the retention or raise the ceilings"
        )
    peak = float(shares.max())
    weights = shares / peak if peak > 0 else shares
    positive = weights > _NEGLIGIBLE
    capacities = floor.copy()
    for members, even in ((positive, False), (~positive, True)):
        (index,) = np.nonzero(members)
        if left <= 0 or len(index) == 0:
            continue
        share = np.ones(len(index)) if even else weights[index]
        taken = _take(share, shares[index], floor[index], ceiling[index], cost[index], left)
        capacities[index] = taken
        left -= int(((taken - floor[index]) * cost[index]).sum())
        if (taken < ceiling[index]).any():
            break  # the prefix ends among these
    return capacities


def _counts(scale: float, shares: Numbers, floor: Counts, ceiling: Counts) -> Counts:
    """Capacities once every event up to lambda = scale is taken."""
    rounded: Counts = np.minimum(np.floor(shares * scale + 0.5), _MOST).astype(np.int64)
    return np.minimum(np.maximum(rounded, floor), ceiling)


def _take(share: Numbers, tie: Numbers, floor: Counts, ceiling: Counts, cost: Counts, left: int) -> Counts:
    """The prefix of the events that costs at most `left`."""
    spent = _spending(share, floor, ceiling, cost)
    low, high = 0.0, _upper(share, ceiling)
    below, above = 0, spent(high)
    if above <= left:
        return ceiling
    few = max(8, len(share)) * int(cost.max())  # equal shares come at once, and sorting them costs less than going on
    while above - below > few and high - low > _MARGIN * high:
        middle = (low * high) ** 0.5 if low > 0 and high > 4 * low else (low + high) / 2
        now = spent(middle)
        low, below, high, above = (middle, now, high, above) if now <= left else (low, below, middle, now)
    counts = _counts(low * (1 - _MARGIN), share, floor, ceiling)
    last = _counts(high * (1 + _MARGIN), share, floor, ceiling)
    left -= int(((counts - floor) * cost).sum())
    shares, ties, prices = share.tolist(), tie.tolist(), cost.tolist()
    least, most, first, stop = floor.tolist(), ceiling.tolist(), counts.tolist(), last.tolist()
    events = [
        ((k + 0.5) / shares[i], -ties[i], k, least[i], most[i], prices[i], i)
        for i in np.nonzero(last > counts)[0].tolist()
        for k in range(first[i], stop[i])
    ]
    for *_, index in sorted(events):
        left -= prices[index]
        if left < 0:
            break
        counts[index] += 1
    return counts


def _spending(share: Numbers, floor: Counts, ceiling: Counts, cost: Counts) -> Callable[[float], int]:
    """What every event up to lambda costs, as `_counts` counts them: of a few heads in Python, which calls less."""
    if len(share) > _FEW_HEADS:
        return lambda scale: int(((_counts(scale, share, floor, ceiling) - floor) * cost).sum())
    heads = list(zip(share.tolist(), floor.tolist(), ceiling.tolist(), cost.tolist(), strict=True))
    return lambda scale: sum(
        (min(max(int(min(own * scale + 0.5, _MOST)), least), most) - least) * price for own, least, most, price in heads
    )


def _upper(share: Numbers, ceiling: Counts) -> float:
    """A lambda past the last event."""
    return float(((ceiling + 1) / share).max())
