"""The definition and the torch path: the order in which entries are given up.

Every entry has one int64 key: two bits of tier, 32 bits of score in an order-preserving form, 29 bits of position.
Positions of a segment differ, so its keys do and the order is total: at equal scores the older entry goes first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

POSITION_BITS = 29
ABSENT = -1
_KEY_BITS = 32 + POSITION_BITS
PLAIN, RECENT, PINNED = (tier << _KEY_BITS for tier in (1, 2, 3))
"""The least key of each tier. From `RECENT` on, scores do not count."""
_LIMITS = torch.iinfo(torch.int64)
NO_KEY = _LIMITS.max

Spans = Sequence[tuple[int, int]]


def is_pinned(positions: Tensor, num_sink_tokens: int, spans: Spans) -> Tensor:
    """Sink tokens and spans; bool, of the shape of `positions`."""
    return _in_spans(positions, num_sink_tokens, spans) & (positions >= 0)


def ranking(
    scores: Tensor | None, positions: Tensor, seen: Tensor, num_sink_tokens: int, recent_window: int, spans: Spans
) -> Tensor:
    """One int64 key for each candidate; larger is kept.

    scores:    float32 [S, N], or None: then the most recent are kept
    positions: int64 [S, N], below 2**29, -1 for an absent candidate, whose key is -1
    seen:      int64 [S, 1], tokens of each segment's sequence
    """
    key = torch.full_like(positions, PLAIN) if scores is None else _plain_keys(scores)
    if recent_window:
        key = torch.where(positions >= seen - recent_window, RECENT, key)
    if num_sink_tokens or spans:
        key = torch.where(_in_spans(positions, num_sink_tokens, spans), PINNED, key)
    return key | positions  # ABSENT where positions are: -1 has every bit set


def worst(keys: Tensor) -> Tensor:
    """Column of each segment's worst candidate, -1 where none is present. keys: [S, N], N > 0; returns int64 [S]."""
    least, column = (keys ^ _LIMITS.min).min(1)  # as unsigned numbers would compare, among which ABSENT is the largest
    return column.where(least != NO_KEY, -1)


def reference_evict(
    scores: Tensor | None,
    positions: Tensor,
    starts: Tensor,
    lengths: Tensor,
    seen: Tensor,
    num_sink_tokens: int,
    recent_window: int,
    spans: Spans,
) -> Tensor:
    """Shapes as in `evict`."""
    width = int(lengths.max()) if len(lengths) else 0
    if not width:
        return torch.full_like(starts, -1)
    column = torch.arange(width, device=starts.device)
    rows = (starts[:, None] + column).clamp_(max=len(positions) - 1)
    # flat, as the CPU then copies rows; that is several times faster than an index of two dimensions
    place = positions.index_select(0, rows.view(-1)).view_as(rows).long()
    place = torch.where(column < lengths[:, None], place, ABSENT)
    scores = None if scores is None else scores.index_select(0, rows.view(-1)).view_as(rows)
    seen = seen[:, None].expand(-1, len(starts) // len(seen)).reshape(-1, 1)
    return worst(ranking(scores, place, seen, num_sink_tokens, recent_window, spans))


def reference_rank(
    scores: Tensor | None,
    positions: Tensor,
    starts: Tensor,
    lengths: Tensor,
    seen: Tensor,
    width: int,
    fresh: Tensor | None,
    num_sink_tokens: int,
    recent_window: int,
    spans: Spans,
) -> tuple[Tensor, Tensor]:
    """Shapes as in `rank`."""
    column = torch.arange(width, device=starts.device)
    rows = (starts[:, None] + column).clamp_(max=max(len(positions) - 1, 0))
    place = positions.new_full(rows.shape, ABSENT, dtype=torch.int64)
    if rows.numel() and len(positions):
        held = positions.index_select(0, rows.view(-1)).view_as(rows).long()
        place = torch.where(column < lengths[:, None], held, place)
    if fresh is not None:
        place = torch.cat([place, fresh.repeat_interleave(len(starts) // len(fresh), 0)], 1)
    seen = seen[:, None].expand(-1, len(starts) // len(seen)).reshape(-1, 1)
    return place, ranking(scores, place, seen, num_sink_tokens, recent_window, spans)


def _in_spans(positions: Tensor, num_sink_tokens: int, spans: Spans) -> Tensor:
    """`is_pinned`, but for -1, of which it may say either."""
    pinned = positions < num_sink_tokens
    for begin, end in spans:
        pinned = pinned | ((positions >= begin) & (positions < end))
    return pinned


def _plain_keys(scores: Tensor) -> Tensor:
    """Keys of the first tier without their positions: float32 to int64, order-preserving."""
    bits = (scores + 0.0).view(torch.int32)  # + 0.0: minus zero equals zero
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()  # from -2**31 on
    return (ordered + ((1 << 32) + (1 << 31))) << POSITION_BITS
