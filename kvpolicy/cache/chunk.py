"""Tokens on their way into a layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from kvpolicy_kernels.segments import Chunk as MaskedChunk
from torch import Tensor

from kvpolicy.cache.device_tables import on_device


@dataclass(slots=True, eq=False)
class Chunk:
    """Tokens that are not in the arena yet.

    key, value: [B, H, n, dim];  positions: int64 [B, n] on the CPU, -1 for padding
    """

    key: Tensor
    value: Tensor
    positions: Tensor

    def __len__(self) -> int:
        return int(self.key.shape[2])

    @property
    def count(self) -> Tensor:
        """int64 [B], tokens without padding."""
        return (self.positions >= 0).sum(1)

    def part(self, columns: slice) -> Chunk:
        """Some of its columns, as views."""
        return Chunk(self.key[:, :, columns], self.value[:, :, columns], self.positions[:, columns])

    def masked(self, mask: Tensor | None) -> MaskedChunk:
        """As the ops take it. mask: bool [B or 1, 1, n, len(self)], None is causal."""
        return MaskedChunk(self.key, self.value, mask)

    def positions_on(self, device: torch.device) -> Tensor:
        """int64 [B, H, n], the same for every KV head."""
        return on_device(self.positions, device)[:, None].expand(-1, self.key.shape[1], -1)

    def owned(self) -> Chunk:
        """A copy that keeps nothing else alive."""
        return Chunk(*(x.detach().clone() for x in (self.key, self.value, self.positions)))
