"""Which entries are kept: the one place where scores, sink tokens, the recent window and protected spans meet.

Every candidate gets one int64 key: two bits of tier, 32 bits of score in an order-preserving form, 29 bits of
position. Keys are distinct, so the order is total: at equal scores the more recent entry is kept.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvpolicy.cache.arena import on_device
from kvpolicy.errors import BudgetError

_PLAIN, _RECENT, _PINNED = 1, 2, 3
_POSITION_BITS = 29
MAX_TOKENS = 2**_POSITION_BITS - 1
ABSENT = -1


@dataclass(frozen=True, slots=True)
class Protection:
    """What is never evicted.

    num_sink_tokens: first positions;  recent_window: last positions. Both count inside a capacity; the recent
        window gives way where a capacity is smaller than both.
    spans: [begin, end) positions, on top of a capacity
    """

    num_sink_tokens: int = 0
    recent_window: int = 0
    spans: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, num_sink_tokens: int, recent_window: int, spans: Sequence[Sequence[int]]) -> Protection:
        """Sorted and merged. Raises `BudgetError` for a span that is no (begin, end) with 0 <= begin < end."""
        merged: list[tuple[int, int]] = []
        for begin, end in sorted(_read_span(span) for span in spans):
            if merged and begin <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(merged[-1][1], end))
            else:
                merged.append((begin, end))
        return cls(num_sink_tokens, recent_window, tuple(merged))

    @property
    def end(self) -> int:
        """First position behind every span."""
        return self.spans[-1][1] if self.spans else 0

    @property
    def num_pinned(self) -> int:
        """Sink tokens and tokens of spans, once all have come."""
        return self.num_sink_tokens + self.num_spanned(self.end)

    def num_spanned(self, seen: int) -> int:
        """Entries that the spans add to a capacity after `seen` tokens; sink tokens are inside it already."""
        return sum(max(0, min(end, seen) - max(begin, self.num_sink_tokens)) for begin, end in self.spans)

    def pinned(self, positions: Tensor) -> Tensor:
        """Sink tokens and spans; bool, of the shape of `positions`."""
        pinned = positions < self.num_sink_tokens
        for begin, end in self.spans:
            pinned = pinned | ((positions >= begin) & (positions < end))
        return pinned & (positions >= 0)


def ranking(scores: Tensor | None, positions: Tensor, seen: Tensor, protection: Protection) -> Tensor:
    """One int64 key for each candidate; larger is kept.

    scores:    float32 [S, N], or None: then the most recent are kept
    positions: int64 [S, N], -1 for an absent candidate, whose key is -1
    seen:      int64 [S, 1], tokens of each segment's sequence
    """
    tier = _tiers(positions, seen, protection)
    key = (tier << (32 + _POSITION_BITS)) | positions
    if scores is not None:
        key = key | torch.where(tier == _PLAIN, _ordered(scores) << _POSITION_BITS, 0)
    return key  # ABSENT where positions are: -1 has every bit set


def comparable(scores: Tensor, positions: Tensor, seen: Tensor, protection: Protection) -> Tensor:
    """The scores as KV heads compete with them: inf for entries that stay whatever their score (sink tokens, the recent
    window), -inf for absent ones and for those of spans, which are on top. Arguments as in `ranking`.
    """
    tier = _tiers(positions, seen, protection)
    scores = scores.masked_fill(tier > _PLAIN, float("inf"))
    beside = (positions < 0) | (protection.pinned(positions) & (positions >= protection.num_sink_tokens))
    return scores.masked_fill(beside, float("-inf"))


def kept_columns(keys: Tensor, positions: Tensor, counts: Tensor, protection: Protection) -> Tensor:
    """Columns of the `counts[s]` best candidates of each segment: pinned ones first, then by position.

    keys, positions: [S, N];  counts: int [S] on the CPU. Returns int64 [S, max(counts)]; behind a segment's count
    the columns mean nothing.
    """
    most = int(counts.max())
    best = torch.topk(keys, most, dim=1).indices
    place = positions.gather(1, best)
    place = torch.where(protection.pinned(place), place, place + MAX_TOKENS)
    surplus = torch.arange(most, device=place.device)[None] >= on_device(counts[:, None], place.device)
    place = place.masked_fill(surplus, torch.iinfo(torch.int64).max)
    return best.gather(1, place.argsort(dim=1))


def evictable(keys: Tensor) -> Tensor:
    """Column of each segment's worst candidate that is present. keys: [S, N]; returns int64 [S]."""
    return torch.where(keys == ABSENT, torch.iinfo(torch.int64).max, keys).argmin(1)


def _tiers(positions: Tensor, seen: Tensor, protection: Protection) -> Tensor:
    tier = torch.full_like(positions, _PLAIN)
    if protection.recent_window:
        tier[positions >= seen - protection.recent_window] = _RECENT
    tier[protection.pinned(positions)] = _PINNED
    return tier


def _read_span(span: Sequence[int]) -> tuple[int, int]:
    numbers: tuple[int, ...] = ()
    with contextlib.suppress(TypeError):
        numbers = tuple(operator.index(number) for number in span)
    if len(numbers) != 2 or not 0 <= numbers[0] < numbers[1]:
        raise BudgetError(f"a protected span must be (begin, end) with 0 <= begin < end, got {span!r}")
    return numbers[0], numbers[1]


def _ordered(scores: Tensor) -> Tensor:
    """float32 to int64 in [0, 2**32), order-preserving."""
    bits = (scores + 0.0).view(torch.int32).long() & 0xFFFFFFFF  # + 0.0: minus zero equals zero
    return torch.where(bits >= 0x80000000, 0xFFFFFFFF - bits, bits + 0x80000000)
