"""Which entries are kept: the one place where scores, sink tokens, the recent window and protected spans meet.

The order itself is that of the op `evict`, which looks for the worst entry while decoding: one int64 key a candidate,
all of them distinct, so that at equal scores the more recent entry is kept.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from kvpolicy_kernels.evict import reference as order
from torch import Tensor

from kvpolicy.cache.device_tables import on_device
from kvpolicy.errors import BudgetError

MAX_TOKENS = 2**order.POSITION_BITS - 1
ABSENT = order.ABSENT


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
        return order.is_pinned(positions, self.num_sink_tokens, self.spans)


def ranking(scores: Tensor | None, positions: Tensor, seen: Tensor, protection: Protection) -> Tensor:
    """One int64 key for each candidate; larger is kept.

    scores:    float32 [S, N], or None: then the most recent are kept
    positions: int64 [S, N], -1 for an absent candidate, whose key is -1
    seen:      int64 [S, 1], tokens of each segment's sequence
    """
    return order.ranking(
        scores, positions, seen, protection.num_sink_tokens, protection.recent_window, protection.spans
    )


def comparable(scores: Tensor, positions: Tensor, keys: Tensor, protection: Protection) -> Tensor:
    """The scores as KV heads compete with them: inf for entries that stay whatever their score (sink tokens, the recent
    window), -inf for absent ones and for those of spans, which are on top.

    scores, positions: as in `ranking`;  keys: of candidates without scores
    """
    scores = scores.masked_fill(keys >= order.RECENT, float("inf"))
    beside = positions < 0
    if protection.spans:
        beside |= protection.pinned(positions) & (positions >= protection.num_sink_tokens)
    return scores.masked_fill_(beside, float("-inf"))


def kept_columns(keys: Tensor, counts: Tensor, protection: Protection, *, in_order: bool = False) -> Tensor:
    """Columns of the `counts[s]` best candidates of each segment: pinned ones first, then by position.

    keys: int64 [S, N], as in `ranking`;  counts: int [S] on the CPU;  in_order: whether candidates lie by position
    Returns int64 [S, max(counts)]; behind a segment's count the columns mean nothing.
    """
    numbers = counts.tolist()
    least, most = min(numbers), max(numbers)
    kept, best = torch.topk(keys, most, dim=1, sorted=least < most)
    if in_order := in_order and not protection.spans:  # sink tokens have the first positions
        place, last = best, keys.shape[1] - 1
    else:
        place, last = kept & MAX_TOKENS, torch.iinfo(torch.int64).max  # a key says where its candidate stands
    if protection.spans:
        place.add_(kept < order.PINNED, alpha=MAX_TOKENS)
    if least < most:
        surplus = torch.arange(most, device=place.device)[None] >= on_device(counts[:, None], place.device)
        place.masked_fill_(surplus, last)
    return place.sort(dim=1).values if in_order else best.gather(1, place.argsort(dim=1))


def _read_span(span: Sequence[int]) -> tuple[int, int]:
    numbers: tuple[int, ...] = ()
    with contextlib.suppress(TypeError):
        numbers = tuple(operator.index(number) for number in span)
    if len(numbers) != 2 or not 0 <= numbers[0] < numbers[1]:
        raise BudgetError(f"a protected span must be (begin, end) with 0 <= begin < end, got {span!r}")
    return numbers[0], numbers[1]
