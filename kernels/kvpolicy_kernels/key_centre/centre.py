"""What the keys of a head have in common, so that no codes are spent on it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

CIRCLE = 2**32
"""Parts of a circle. Angles of 32 bits wrap as angles do, so kernels and torch agree at any position."""


@dataclass(frozen=True, slots=True, eq=False)
class KeyCentre:
    """A row for each head, part of which turns with the position p.

    It is `c[0] + sum over j < J of c[1 + 2 j] cos(p f[j]) + c[2 + 2 j] sin(p f[j])`.

    coefficients: float32 [1 + 2 J, num_kv_heads, D], contiguous
    frequencies:  int32 [num_kv_heads, J], contiguous, in parts of a circle (`CIRCLE`) a token

    Raises `ValueError` for others.
    """

    coefficients: Tensor
    frequencies: Tensor

    def __post_init__(self) -> None:
        own, turns = self.coefficients, self.frequencies
        fits = own.dim() == 3 and turns.dim() == 2 and own.shape[:2] == (1 + 2 * turns.shape[1], turns.shape[0])
        if not fits or (own.dtype, turns.dtype) != (torch.float32, torch.int32):
            raise ValueError(
                "KeyCentre: expected coefficients float32 [1 + 2 J, heads, D] and frequencies int32 [heads, J], got "
                f"{list(own.shape)} of {own.dtype} and {list(turns.shape)} of {turns.dtype}"
            )
        if not own.is_contiguous() or not turns.is_contiguous():
            raise ValueError("KeyCentre: coefficients and frequencies must be contiguous")

    @property
    def shape(self) -> tuple[int, int]:
        """(num_kv_heads, D)"""
        return self.coefficients.shape[1], self.coefficients.shape[2]

    def of(self, heads: Tensor, positions: Tensor) -> Tensor:
        """float32 [..., D]. heads, positions: whole numbers of shapes that fit each other, on its device"""
        heads, positions = torch.broadcast_tensors(heads, positions)  # type: ignore[no-untyped-call]
        turned = positions.long()[..., None] * self.frequencies[heads]
        angles = ((turned + CIRCLE // 2) % CIRCLE - CIRCLE // 2).float() * (2 * math.pi / CIRCLE)
        waves = torch.stack([angles.cos(), angles.sin()], -1).flatten(-2)
        out = self.coefficients[0, heads]
        for i, own in enumerate(self.coefficients[1:]):
            out = torch.addcmul(out, own[heads], waves[..., i, None])
        return out

    def along(self, count: int) -> Tensor:
        """Of every head at the positions below `count`, float32 [num_kv_heads, count, D]."""
        device = self.coefficients.device
        return self.of(torch.arange(self.shape[0], device=device)[:, None], torch.arange(count, device=device))

    def to(self, device: torch.device) -> KeyCentre:
        return KeyCentre(self.coefficients.to(device), self.frequencies.to(device))
