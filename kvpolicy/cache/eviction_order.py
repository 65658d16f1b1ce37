"""In which order the entries of a prompt will leave, where decoding does not change their scores.

A decoded token is kept before any entry of the prompt, and of decoded tokens the oldest goes first. So all evictions
to come are known once the prompt has been scored: a segment whose entries lie in that order is a ring, whatever the
policy, and decoding needs neither scores nor a search for the worst.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvpolicy.cache.select import ABSENT, Protection, ranking

_LAST = torch.iinfo(torch.int64).max
_MOST = 1 << 24  # pairs of candidates at a time


def eviction_order(scores: Tensor, positions: Tensor, seen: Tensor, spare: Tensor, protection: Protection) -> Tensor:
    """Columns of each segment: pinned entries first, by position, then the others in the order in which they leave.

    scores:    float32 [S, N]
    positions: int64 [S, N], ascending behind the pinned, as `kept_columns` leaves them; -1 for an absent entry, and
               those come last
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
    segments, total = order.shape
    count = min(window, total)  # evictions that the window may change
    columns = torch.arange(total, device=order.device)
    evictable = (positions != ABSENT) & ~pinned
    inside = evictable & (positions >= seen - window)
    outside = evictable & ~inside
    free, is_free = _first(order, outside, count)
    waiting, is_waiting = _first(columns.expand_as(order), inside, count)
    candidates, present = torch.cat([free, waiting], 1), torch.cat([is_free, is_waiting], 1)
    # the eviction from which on each may leave: once decoded tokens have freed it, or nothing else is left
    freed = positions.gather(1, waiting) - (seen - window) - spare[:, None] + 1
    steps = torch.arange(count, device=order.device)
    alone = outside.sum(1, keepdim=True) + 1 + steps
    opens = torch.cat([torch.zeros_like(free), torch.minimum(freed, alone)], 1)
    opens = opens.masked_fill(~present, count + 1)  # never
    slots = _slots(keys.gather(1, candidates), opens, count) - 1
    leaving = torch.full((segments, count + 1), total, device=order.device).scatter_(1, slots, candidates)[:, :count]
    gone = present.sum(1, keepdim=True).clamp(max=count)
    # between the pinned and all others, which stay in their order
    leaves = torch.zeros(segments, total + 1, dtype=torch.bool, device=order.device).scatter_(1, leaving, True)
    stays = ~leaves.gather(1, order)
    place = stays.cumsum(1) - 1 + torch.where(pinned.gather(1, order), 0, gone)
    result = order.new_empty(segments, total + 1).scatter_(1, torch.where(stays, place, total), order)
    place = torch.where(steps < gone, pinned.sum(1, keepdim=True) + steps, total)
    return result.scatter_(1, place, leaving)[:, :total]


def _slots(keys: Tensor, opens: Tensor, count: int) -> Tensor:
    """At which eviction each candidate leaves, int64 [S, N], from 1; above `count` if it does not by then.

    keys: int64 [S, N], distinct, the smallest leaves first;  opens: the first eviction at which a candidate may leave

    Every eviction takes one, so a candidate leaves at the first from its `opens` on that those with smaller keys leave
    free. They queue for it: by eviction t, of a(t) that may leave min(a(t), 1 + those by t - 1) have left, which is
    t + min(0, a(s) - s) over all s <= t. A few launches for all t, where a loop would take some for each.
    """
    steps = torch.arange(1, count + 1, device=keys.device)
    may = (opens[..., None] <= steps).float()  # [S, N, count]
    size = max(1, _MOST // keys.numel())
    slots = []
    for own, begin in zip(torch.split(keys, size, 1), torch.split(opens, size, 1), strict=True):
        came = (keys[:, None] < own[..., None]).float() @ may  # [S, each, count]: those with smaller keys
        left = (came - steps).cummin(2).values.clamp(max=0) + steps
        taken = left > F.pad(left, (1, 0))[..., :-1]
        slots.append(torch.where(~taken & (steps >= begin[..., None]), steps, count + 1).amin(2))
    return torch.cat(slots, 1)


def _first(order: Tensor, among: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` of the columns that are marked, int64 [S, count], and which of them there are, bool.

    order: the columns of each row, int64 [S, N];  among: the mark of each column, bool [S, N]
    """
    marked = among.gather(1, order)
    place = torch.where(marked, (marked.cumsum(1) - 1).clamp(max=count), count)
    columns = order.new_zeros(len(order), count + 1).scatter_(1, place, order)[:, :count]
    return columns, torch.arange(count, device=order.device) < marked.sum(1, keepdim=True)
