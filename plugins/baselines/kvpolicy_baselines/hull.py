"""Hull: entries go where the next one lowers the loss most, by the convex hulls of measured curves.

Source: LU-KV, arXiv:2602.08585 (marginal utility on convex hulls, greedy), reconstructed: its repository was not
readable. The curves are whatever the estimator measured; the paper's are those of an oracle of attention.

Different on purpose: no KV head stays below the smallest capacity that was measured while entries are left. Going on
along the curve instead sent 43 of the 90 heads of SmolLM2-135M to their floor, and what they lose there together no
measurement of one head has shown.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from kvpolicy import Budget, BudgetAllocator, Importance, PluginError


class _Segment(NamedTuple):
    gain: float  # loss that a unit of cost saves, >= 0; infinite where it was not measured
    head: int
    room: float  # entries
    cost: int  # of an entry


@dataclass(frozen=True, slots=True)
class HullAllocator(BudgetAllocator):
    """Every KV head starts at its floor; the next entry goes to the head whose hull falls most steeply there.

    The hull of a head is the lower convex hull of its curve. Up to the smallest measured capacity, below which nothing
    is known, all heads are filled first; beyond the largest, and where a curve rises, more entries save nothing. Heads
    that fall alike are filled alike. No parameters.

    Raises `PluginError` for importance without curves of two points or more.
    """

    needs_curves: ClassVar[bool] = True

    def shares(self, importance: Importance, budget: Budget) -> Tensor:
        curves, points = importance.curves, importance.curve_capacities
        if curves is None or points is None or len(points) < 2:
            raise PluginError(
                "hull: the importance has no curves of two capacities or more, and needs them: measure it with an "
                "estimator that gives curves, such as --estimator sensitivity, or take another allocator, such as "
                "power"
            )
        floors, ceilings = (bound.flatten().tolist() for bound in (budget.floors(), budget.ceilings()))
        costs = [1] * len(floors) if budget.cost is None else budget.cost.flatten().tolist()
        left = float(budget.total - sum(floor * cost for floor, cost in zip(floors, costs, strict=True)))
        if left <= 0:
            return torch.ones(budget.shape, dtype=torch.float64)  # the floors are all there is
        segments = [
            segment
            for head, curve in enumerate(curves.double().flatten(0, 1).tolist())
            for segment in _segments(head, _hull(points.tolist(), curve), floors[head], ceilings[head], costs[head])
        ]
        return _filled(segments, floors, left).reshape(budget.shape)


def _hull(capacities: list[int], losses: list[float]) -> list[tuple[int, float]]:
    """The corners of the lower convex hull, from the least capacity to the greatest."""
    corners: list[tuple[int, float]] = []
    for point in zip(capacities, losses, strict=True):
        while len(corners) > 1 and _slope(corners[-2], corners[-1]) >= _slope(corners[-1], point):
            corners.pop()
        corners.append(point)
    return corners


def _slope(first: tuple[int, float], second: tuple[int, float]) -> float:
    return (second[1] - first[1]) / (second[0] - first[0])


def _segments(head: int, corners: list[tuple[int, float]], floor: int, ceiling: int, cost: int) -> list[_Segment]:
    """Those between floor and ceiling; their gains fall."""
    gains = [math.inf, *(max(0.0, -_slope(first, second)) for first, second in pairwise(corners))]
    inner = [capacity for capacity, _ in corners]
    ends = [floor, *(min(max(capacity, floor), ceiling) for capacity in inner), ceiling]
    return [
        _Segment(gain / cost, head, end - begin, cost)
        for gain, (begin, end) in zip([*gains, 0.0], pairwise(ends), strict=True)
        if end > begin
    ]


def _filled(segments: list[_Segment], floors: list[int], left: float) -> Tensor:
    """The floors with entries that cost `left` on top, the largest gains first; equal gains get the same part of their
    room.
    """
    filled = torch.tensor(floors, dtype=torch.float64)
    by_gain: dict[float, list[_Segment]] = {}
    for segment in segments:
        by_gain.setdefault(segment.gain, []).append(segment)
    for gain in sorted(by_gain, reverse=True):
        room = sum(segment.room * segment.cost for segment in by_gain[gain])
        part = min(1.0, left / room)
        for segment in by_gain[gain]:
            filled[segment.head] += part * segment.room
        left -= part * room
        if left <= 0:
            break
    return filled
