"""Pooling over neighbours by position."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

Pooling = Literal["avg", "max"]


def pooled(mass: Tensor, positions: Tensor, kernel_size: int, pooling: Pooling) -> Tensor:
    """Pools over positions, whatever the order of the entries; a position that is not held counts as 0.

    mass, positions: `[B, H, n]`, absent entries at -1;  kernel_size: odd. Absent entries give a number too.
    """
    spare = int(positions.max()) + 1  # a place behind the last position, which takes no attention anywhere
    place = positions.where(positions >= 0, spare)
    dense = mass.new_zeros(*mass.shape[:2], spare + 1).scatter(2, place, mass.masked_fill(positions < 0, 0.0))
    pool = avg_pool1d if pooling == "avg" else max_pool1d
    near: Tensor = pool(dense, kernel_size, stride=1, padding=kernel_size // 2)
    return near.gather(2, place)
