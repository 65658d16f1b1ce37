"""In which order the entries of a prompt will leave, where decoding does not change their scores.

A decoded token is kept before any entry of the prompt, and of decoded tokens the oldest goes first. So all evictions
to come are known once the prompt has been scored: a segment whose entries lie in that order is a ring, whatever the
policy, and decoding needs neither scores nor a search for the worst.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvpolicy.cache.select import ABSENT, Protection, ranking

_LAST = torch.iinfo(torch.int64).max


def eviction_order(scores: Tensor, positions: Tensor, seen: Tensor, spare: Tensor, protection: Protection) -> Tensor:
    """Columns of each segment: pinned entries first, by position, then the others in the order in which they leave.

    scores:    float32 [S, N]
    positions: int64 [S, N], -1 for an absent entry; those come last
    seen:      int64 [S, 1], tokens of each segment's sequence
    spare:     int64 [S], tokens that each segment takes before it is full and has to evict

    Returns int64 [S, N].
    """
    pinned = protection.pinned(positions)
    without_window = Protection(protection.num_sink_tokens, 0, protection.spans)
    keys = ranking(scores, positions, seen, without_window)
    order = torch.where(positions == ABSENT, _LAST, torch.where(pinned, positions - _LAST, keys)).argsort(1)
    if not protection.recent_window:
        return order
    return _with_window(order, keys, positions, pinned, seen, spare, protection.recent_window)


def _with_window(
    order: Tensor, keys: Tensor, positions: Tensor, pinned: Tensor, seen: Tensor, spare: Tensor, window: int
) -> Tensor:
    """Corrects `order` for entries that the recent window protects at first.

    Each decoded token frees one of them, so after `window` evictions all are free, and `order` is right from there on.
    """
    places = torch.arange(order.shape[1], device=order.device)
    rank = torch.empty_like(order).scatter_(1, order, places.expand_as(order))
    evictable = (positions != ABSENT) & ~pinned
    inside = evictable & (positions >= seen - window)
    outside = evictable & ~inside
    free, waiting = _first(rank, outside, window), _first(positions, inside, window)
    columns = torch.cat([free, waiting], 1)
    present = torch.cat([outside.gather(1, free), inside.gather(1, waiting)], 1)
    # the eviction from which on each may leave: once decoded tokens have freed it, or nothing else is left
    freed = positions.gather(1, waiting) - (seen - window) - spare[:, None] + 1
    alone = outside.sum(1, keepdim=True) + 1 + places[: waiting.shape[1]]
    opens = torch.cat([torch.zeros_like(free), torch.minimum(freed, alone)], 1)
    leaving = columns.gather(1, _leaving(keys.gather(1, columns).masked_fill(~present, _LAST), opens, window))
    step = torch.arange(window, device=order.device)
    beyond = step >= present.sum(1, keepdim=True)  # no candidate is left: into a column that is cut off
    rank = torch.cat([rank, rank[:, :1]], 1)
    # before everything but the pinned
    rank = rank.scatter_(1, leaving.masked_fill(beyond, rank.shape[1] - 1), (step - 2 * window).expand_as(leaving))
    rank = torch.where(pinned, rank[:, :-1] - 4 * window - pinned.shape[1], rank[:, :-1])
    return rank.argsort(1)


def _leaving(keys: Tensor, opens: Tensor, count: int) -> Tensor:
    """Which candidates leave, one after another: the worst of those that may. keys, opens: [S, N]; int64 [S, count]."""
    leaving = []
    for step in range(1, count + 1):
        leaving.append(keys.masked_fill(opens > step, _LAST).argmin(1, keepdim=True))
        keys = keys.scatter(1, leaving[-1], _LAST)
    return torch.cat(leaving, 1)


def _first(key: Tensor, among: Tensor, count: int) -> Tensor:
    """The columns of the `count` smallest keys of each row, among those marked; behind those, of others. int64."""
    return key.masked_fill(~among, _LAST).topk(min(count, key.shape[1]), 1, largest=False).indices
