"""Tokens on top of a store that come one by one, in blocks at addresses that stay.

Tokens that may be taken back, or that a measurement keeps, are attended to and are in no arena. Each goes into a block
that has room for all of them, the same for every KV head, and a mask on the device tells which of its columns hold one.
So a token is the same work on the device as the one before, and a CUDA graph may hold it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from kvpolicy_kernels.segments import Chunk as MaskedChunk
from torch import Tensor

from kvpolicy.cache.chunk import Chunk


class Columns:
    """What every layer's block has in common.

    room: columns of a block
    visible: bool [B, 1, 1, room] on each device, those that hold a token
    newest: int64 [1] on each device, the column that the token under way is written to
    """

    def __init__(self, positions: Tensor, room: int, devices: set[torch.device]) -> None:
        """positions: int64 [B, n] of the tokens that are there"""
        self.room = room
        visible = torch.nn.functional.pad(positions >= 0, (0, room - positions.shape[1]))[:, None, None]
        with torch.inference_mode(False):  # else they could not be written to outside of that mode
            self.visible = {device: visible.to(device) for device in devices}
            self.newest = {device: torch.zeros(1, dtype=torch.int64, device=device) for device in devices}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor held, by name."""
        tables = {"visible": self.visible, "newest": self.newest}
        return {f"tail.{name}.{device}": x for name, each in tables.items() for device, x in each.items()}

    def add(self, column: int) -> None:
        """The next token goes there."""
        for device, visible in self.visible.items():
            visible[..., column] = True
            self.newest[device].fill_(column)


@dataclass(slots=True, eq=False)
class Tail(Chunk):
    """The first columns of a block, whose other columns are free.

    block: [B, H, room, D] and [B, H, room, Dv]
    """

    block: tuple[Tensor, Tensor]
    columns: Columns

    @classmethod
    def over(cls, chunk: Chunk, columns: Columns) -> Tail:
        """A block that begins with a copy of these tokens, which `columns` was made for."""
        block = []
        for tokens in (chunk.key, chunk.value):
            batch, num_heads, _, dim = tokens.shape
            with torch.inference_mode(False):  # zeros: what a mask hides is multiplied by 0
                block.append(tokens.new_zeros(batch, num_heads, columns.room, dim))
            block[-1][:, :, : len(chunk)] = tokens.detach()
        return cls(chunk.key, chunk.value, chunk.positions, (block[0], block[1]), columns).longer(chunk.positions)

    def write(self, key: Tensor, value: Tensor) -> None:
        """Writes one token behind the others. key, value: [B, H, 1, dim]."""
        for own, new in zip(self.block, (key, value), strict=True):
            own.index_copy_(2, self.columns.newest[own.device], new.detach())

    def longer(self, positions: Tensor) -> Tail:
        """With what was written there. positions: int64 [B, n + 1]"""
        key, value = (own[:, :, : positions.shape[1]] for own in self.block)
        return Tail(key, value, positions, self.block, self.columns)

    @property
    def whole(self) -> MaskedChunk:
        """As the ops take it: the whole block under its mask."""
        key, value = self.block
        return MaskedChunk(key, value, self.columns.visible[key.device])
