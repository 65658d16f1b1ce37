"""Pooling over neighbours by position."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Pooling = Literal["avg", "max"]


def pooled(mass: Tensor, positions: Tensor, kernel_size: int, pooling: Pooling) -> Tensor:
    """Pools over positions, whatever the order of the entries; a position that is not held counts as 0.

    mass, positions: `[B, H, n]`, absent entries at -1;  kernel_size: odd. Absent entries give a number too.
    """
    # of 32 bits: a sort on a GPU goes over the numbers once for every 8
    half, order = kernel_size // 2, positions.int().argsort(2)
    place, sorted_mass = positions.gather(2, order), mass.gather(2, order)
    # neighbours by position are neighbours in this order, at most as many steps away
    result = sorted_mass.clone()
    for step in range(1, min(half, place.shape[2] - 1) + 1):
        before, behind = slice(None, -step), slice(step, None)
        is_far = (place[..., behind] - place[..., before] > half) | (place[..., before] < 0)
        for at, other in ((before, behind), (behind, before)):
            _combine(result[..., at], sorted_mass[..., other].masked_fill(is_far, 0.0), pooling)
    if pooling == "avg":
        result = result / kernel_size
    return torch.empty_like(result).scatter_(2, order, result)


def _combine(result: Tensor, other: Tensor, pooling: Pooling) -> None:
    """In place."""
    if pooling == "avg":
        result.add_(other)
    else:
        torch.maximum(result, other, out=result)
