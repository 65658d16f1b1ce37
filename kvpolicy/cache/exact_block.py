"""The tokens of a layer that stay as the model made them beside entries that are encoded: sinks and the last ones."""

from __future__ import annotations

import torch
from kvpolicy_kernels.append import append
from torch import Tensor

from kvpolicy.cache.chunk import Chunk
from kvpolicy.cache.copies import copy_with
from kvpolicy.cache.device_tables import on_device


class ExactBlock:
    """A copy of the sink tokens, and of the last tokens in a ring: token p has slot p, or `num_sinks + p % recent`.

    Every token here has its codes in the arena, too. So entries move, leave and are scored as everywhere, a token that
    grows old loses its copy and nothing else happens, and where an entry is read it is the copy if there is one.

    keys: [B, H, N, D];  values: [B, H, N, Dv], N = num_sinks + recent
    positions: int32 [B, N], -1 for a slot without a token
    """

    def __init__(self, key: Tensor, value: Tensor, num_sinks: int, recent: int) -> None:
        """Empty. key: [B, H, any, D], value: [B, H, any, Dv], of the dtype and the device that it is to have; Dv may be
        0, for a copy of keys alone
        """
        batch, heads, slots = key.shape[0], key.shape[1], num_sinks + recent
        self.num_sinks, self.recent = num_sinks, recent
        self.keys = key.new_zeros(batch, heads, slots, key.shape[-1])
        self.values = value.new_zeros(batch, heads, slots, value.shape[-1])
        self.positions = torch.full((batch, slots), -1, dtype=torch.int32, device=key.device)

    @property
    def tokens(self) -> dict[str, Tensor]:
        """The copies and their positions, by name."""
        return {f"exact.{name}": getattr(self, name) for name in ("keys", "values", "positions")}

    def write(self, key: Tensor, position: Tensor) -> None:
        """Takes the newest token where copies are of keys alone. key: [B, H, 1, D];  position: int64 [S]"""
        batch, heads, slots = self.keys.shape[:3]
        first = torch.arange(batch * heads, device=self.keys.device) * slots
        append([self.keys.flatten(0, 2)], first + self._slot(position), [key])
        of_row = position[::heads]
        append([self.positions.view(-1)], first[:batch] + self._slot(of_row), [of_row])

    def add(self, chunk: Chunk) -> None:
        """Takes what belongs here of tokens that come behind all others."""
        positions = chunk.positions
        last = positions.amax(1, keepdim=True)
        belongs = (positions >= 0) & ((positions < self.num_sinks) | (positions > last - self.recent))
        row, column = belongs.nonzero(as_tuple=True)
        place = positions[row, column]
        row, column, slot, place = on_device(torch.stack([row, column, self._slot(place), place]), self.keys.device)
        self.keys[row, :, slot] = chunk.key.detach()[row, :, column]
        self.values[row, :, slot] = chunk.value.detach()[row, :, column]
        self.positions[row, slot] = place.int()

    def over(self, keys: Tensor, values: Tensor, positions: Tensor, owners: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of an arena with the copies in their places.

        keys: [R, D];  values: [R, Dv];  positions: int32 [R], negative for a free row;  owners: int64 [R], segments
        """
        heads, slots = self.keys.shape[1:3]
        slot = self._slot(positions.clamp(min=0).long())
        is_here = (self.positions[owners // heads, slot] == positions) & (positions >= 0)
        place = owners * slots + slot
        return tuple(  # type: ignore[return-value]  # two of them
            torch.where(is_here[:, None], own.flatten(0, 2)[place], decoded)
            for own, decoded in ((self.keys, keys), (self.values, values))
        )

    def forget(self, settled: Tensor) -> None:
        """Takes back the tokens from these on. settled: int64 [B]"""
        self.positions.masked_fill_(self.positions >= on_device(settled[:, None], self.positions.device), -1)

    def take(self, rows: Tensor) -> None:
        """Keeps these sequences, in this order. rows: int64 [B'] on the CPU"""
        rows = on_device(rows, self.keys.device)
        stays = len(rows) == len(self.keys)
        for name in ("keys", "values", "positions"):
            new = getattr(self, name)[rows]
            if stays:  # at its address, which a graph knows
                getattr(self, name).copy_(new)
            else:
                setattr(self, name, new)

    def fork(self) -> ExactBlock:
        """A copy in memory of its own."""
        own = {name: getattr(self, name).clone() for name in ("keys", "values", "positions")}
        return copy_with(self, **own)

    def _slot(self, position: Tensor) -> Tensor:
        return torch.where(position < self.num_sinks, position, self.num_sinks + position % self.recent)
