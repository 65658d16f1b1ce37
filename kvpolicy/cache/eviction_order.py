"""In which order the entries of a prompt will leave, where decoding does not change their scores.

A decoded token is kept before any entry of the prompt, and of decoded tokens the oldest goes first. So all evictions
to come are known once the prompt has been scored: a segment whose entries lie in that order is a ring, whatever the
policy, and decoding needs neither scores nor a search for the worst.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvpolicy.cache.select import ABSENT, Protection, ranking


def eviction_order(scores: Tensor, positions: Tensor, seen: Tensor, spare: Tensor, protection: Protection) -> Tensor:
    """Columns of each segment: pinned entries first, by position, then the others in the order in which they leave.

    scores:    float32 [S, N]
    positions: int64 [S, N], -1 for an absent entry; those come last
    seen:      int64 [S, 1], tokens of each segment's sequence
    spare:     int64 [S], tokens that each segment takes before it is full and has to evict

    Returns int64 [S, N].
    """
    last = torch.iinfo(torch.int64).max
    pinned = protection.pinned(positions)
    without_window = Protection(protection.num_sink_tokens, 0, protection.spans)
    keys = ranking(scores, positions, seen, without_window)
    order = torch.where(positions == ABSENT, last, torch.where(pinned, positions - last, keys)).argsort(1)
    if not protection.recent_window:
        return order
    return _with_window(order, keys, positions, pinned, seen, spare, protection.recent_window)


def _with_window(
    order: Tensor, keys: Tensor, positions: Tensor, pinned: Tensor, seen: Tensor, spare: Tensor, window: int
) -> Tensor:
    """Corrects `order` for entries that the recent window protects at first.

    Each decoded token frees one of them, so after `window` evictions all are free, and `order` is right from there on.
    """
    rank = order.argsort(1)  # [S, N], where each column stands in the order
    evictable = (positions != ABSENT) & ~pinned
    recent = evictable & (positions >= seen - window)
    free, waiting = _first(rank, evictable & ~recent, window), _first(positions, recent, window)
    columns = torch.cat([free, waiting], 1)
    # the eviction from which on each may leave: the first one comes with the token behind the spare ones
    waits = positions.gather(1, waiting) - (seen - window) - spare[:, None] + 1
    opens = torch.cat([torch.zeros_like(free), waits], 1)
    missing = ~torch.cat([(evictable & ~recent).gather(1, free), recent.gather(1, waiting)], 1)
    gone = missing.clone()
    for step in range(1, window + 1):
        leaves = _next(keys.gather(1, columns), opens, gone, step)
        column = columns.gather(1, leaves)
        placed = torch.where(gone.all(1, keepdim=True), rank.gather(1, column), step - 2 * window)
        rank.scatter_(1, column, placed)  # before everything but the pinned
        gone.scatter_(1, leaves, True)
    rank = torch.where(pinned, rank - 4 * window - pinned.shape[1], rank)
    return rank.argsort(1)


def _next(keys: Tensor, opens: Tensor, gone: Tensor, step: int) -> Tensor:
    """Who leaves at this eviction, int64 [S, 1]: the worst candidate that may; if none may, the one that may first."""
    last = torch.iinfo(torch.int64).max
    closed = gone | (opens > step)
    worst = keys.masked_fill(closed, last).argmin(1, keepdim=True)
    first = opens.masked_fill(gone, last).argmin(1, keepdim=True)
    return torch.where(closed.all(1, keepdim=True), first, worst)


def _first(key: Tensor, among: Tensor, count: int) -> Tensor:
    """The columns of the `count` smallest keys of each row, among those marked; behind those, of others. int64."""
    key = key.masked_fill(~among, torch.iinfo(torch.int64).max)
    return key.topk(min(count, key.shape[1]), 1, largest=False).indices
