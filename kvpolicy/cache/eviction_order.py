"""In which order the entries of a prompt will leave, where decoding does not change their scores.

A decoded token is kept before any entry of the prompt, and of decoded tokens the oldest goes first. So all evictions
to come are known once the prompt has been scored: a segment whose entries lie in that order is a ring, whatever the
policy, and decoding needs neither scores nor a search for the worst.
"""

from __future__ import annotations

import heapq

import torch
from torch import Tensor

from kvpolicy.cache.select import ABSENT, Protection, ranking


def eviction_order(scores: Tensor, positions: Tensor, seen: Tensor, spare: Tensor, protection: Protection) -> Tensor:
    """Columns of each segment: pinned entries first, by position, then the others in the order in which they leave.

    scores:    float32 [S, N]
    positions: int64 [S, N], -1 for an absent entry; those come last
    seen:      int64 [S, 1], tokens of each segment's sequence
    spare:     int64 [S] on the CPU, tokens that each segment takes before it is full and has to evict

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
    candidates = _first(rank, evictable & ~recent, window), _first(positions, recent, window)
    for segment, (free, waiting, more) in enumerate(zip(*candidates, spare.tolist(), strict=True)):
        oldest = int(seen[segment]) - window
        place = positions[segment, waiting].tolist()
        heap = list(zip(keys[segment, free].tolist(), free, strict=True))
        held = list(zip(place, keys[segment, waiting].tolist(), waiting, strict=True))
        for step, column in enumerate(_leaving(heap, held, oldest, more, window)):
            rank[segment, column] = step - 2 * window  # before everything but the pinned
    rank = torch.where(pinned, rank - 4 * window - pinned.shape[1], rank)
    return rank.argsort(1)


def _leaving(
    heap: list[tuple[int, int]], held: list[tuple[int, int, int]], oldest: int, spare: int, window: int
) -> list[int]:
    """Columns of the first `window` entries that leave.

    heap: (key, column) of the worst entries outside the window;  held: (position, key, column) inside it, by position
    oldest: the window's first position;  spare: tokens that come before the first eviction
    """
    heapq.heapify(heap)
    leaving, freed = [], 0
    for step in range(1, window + 1):
        while freed < len(held) and held[freed][0] < oldest + spare + step:
            heapq.heappush(heap, held[freed][1:])
            freed += 1
        if not heap:  # nothing but the window is left: its oldest
            if freed == len(held):
                break
            heapq.heappush(heap, held[freed][1:])
            freed += 1
        leaving.append(heapq.heappop(heap)[1])
    return leaving


def _first(key: Tensor, among: Tensor, count: int) -> list[list[int]]:
    """The columns of the `count` smallest keys of each row, among those marked, in order."""
    count = min(count, key.shape[1])
    key = key.masked_fill(~among, torch.iinfo(torch.int64).max)
    columns = key.topk(count, 1, largest=False).indices.tolist()
    present = among.sum(1).clamp(max=count).tolist()
    return [row[:number] for row, number in zip(columns, present, strict=True)]
