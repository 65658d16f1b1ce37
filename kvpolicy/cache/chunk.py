"""Tokens on their way into a layer."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from kvpolicy_kernels.segments import Chunk as MaskedChunk
from torch import Tensor

from kvpolicy.cache.device_tables import on_device
from kvpolicy.cache.select import MAX_TOKENS
from kvpolicy.errors import BudgetError


class Places:
    """The positions of tokens, and what follows from them: worked out once for all layers of a forward.

    on_host: int64 [B, n], -1 for padding
    count:   int64 [B], tokens without padding
    after:   int64 [B], tokens of each sequence with these; None where nobody has said
    """

    def __init__(self, on_host: Tensor, before: Tensor | None = None) -> None:
        """before: int64 [B], tokens of each sequence without these"""
        self.on_host, self.count = on_host, (on_host >= 0).sum(1)
        self.after = None if before is None else before + self.count
        self.has_padding = int(self.count.sum()) < on_host.numel()
        self._placed: dict[tuple[str, torch.device], Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """int64 [B, n] there, which is not waited for."""
        return self._brought("positions", self.on_host, device)

    def after_on(self, device: torch.device) -> Tensor:
        """int64 [B] there, likewise."""
        assert self.after is not None  # else it is not asked for
        return self._brought("after", self.after, device)

    def _brought(self, name: str, table: Tensor, device: torch.device) -> Tensor:
        if (name, device) not in self._placed:
            self._placed[name, device] = on_device(table, device)
        return self._placed[name, device]


@dataclass(frozen=True, slots=True, eq=False)
class Arrival:
    """New tokens of a forward, as each of its layers counts them.

    before, after: int64 [B], tokens of each sequence;  valid: bool [B, n] or None, which tokens are no padding
    """

    before: Tensor
    after: Tensor
    valid: Tensor | None
    places: Places

    @classmethod
    def of(cls, before: Tensor, valid: Tensor | None, count: int) -> Arrival:
        """Raises `BudgetError` for more tokens than a sequence can have."""
        steps = torch.arange(count).expand(len(before), -1)
        if valid is not None:
            steps = torch.where(valid, valid.cumsum(1) - 1, -1)
        places = Places(torch.where(steps >= 0, steps + before[:, None], -1), before)
        assert places.after is not None  # as it has been told what came before
        if int(places.after.max()) > MAX_TOKENS:
            raise BudgetError(f"a sequence can have {MAX_TOKENS} tokens at most")
        return cls(before, places.after, valid, places)

    def is_of(self, seen: Tensor, valid: Tensor | None, count: int) -> bool:
        """Whether these tokens come to a layer that has seen so many. Arguments as in `of`"""
        same = valid is self.valid and count == self.places.on_host.shape[1]
        return same and (seen is self.before or torch.equal(seen, self.before))


@dataclass(slots=True, eq=False)
class Chunk:
    """Tokens that are not in the arena yet.

    key, value: [B, H, n, dim];  positions: int64 [B, n] on the CPU, -1 for padding
    """

    key: Tensor
    value: Tensor
    positions: Tensor
    _places: Places | None = field(default=None, kw_only=True)

    def __len__(self) -> int:
        return int(self.key.shape[2])

    @property
    def places(self) -> Places:
        """Its positions on any device; of a chunk under way those of all layers."""
        return Places(self.positions) if self._places is None else self._places

    @property
    def count(self) -> Tensor:
        """int64 [B], tokens without padding."""
        return self.places.count

    def part(self, columns: slice) -> Chunk:
        """Some of its columns, as views."""
        if columns.indices(len(self)) == (0, len(self), 1):
            return Chunk(self.key, self.value, self.positions, _places=self._places)
        return Chunk(self.key[:, :, columns], self.value[:, :, columns], self.positions[:, columns])

    def masked(self, mask: Tensor | None) -> MaskedChunk:
        """As the ops take it. mask: bool [B or 1, 1, n, len(self)], None is causal."""
        return MaskedChunk(self.key, self.value, mask)

    def positions_on(self, device: torch.device) -> Tensor:
        """int64 [B, H, n], the same for every KV head."""
        return self.places.on(device)[:, None].expand(-1, self.key.shape[1], -1)

    def owned(self) -> Chunk:
        """A copy that keeps nothing else alive."""
        return Chunk(*(x.detach().clone() for x in (self.key, self.value, self.positions)))
