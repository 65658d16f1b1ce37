"""Pooling over neighbours by position."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

Pooling = Literal["avg", "max"]


def pooled(mass: Tensor, positions: Tensor, kernel_size: int, pooling: Pooling) -> Tensor:
    """Pools over positions, whatever the order of the entries; a position that is not held counts as 0.

    mass, positions: `[B, H, n]`, absent entries at -1;  kernel_size: odd. Absent entries give a number too.
    """
    half = kernel_size // 2
    # of 32 bits: a sort on a GPU goes over the numbers once for every 8
    place, order = positions.int().sort(2)
    # neighbours by position are neighbours in this order, at most `half` steps away: [B, H, n, kernel_size]
    near, values = (
        pad(x, (half, half), value=fill).unfold(2, kernel_size, 1)
        for x, fill in ((place, -1), (mass.gather(2, order), 0))
    )
    values = values.masked_fill(((near - place[..., None]).abs() > half) | (near < 0), 0.0)
    result = values.sum(3) / kernel_size if pooling == "avg" else values.amax(3)
    return torch.empty_like(result).scatter_(2, order, result)
