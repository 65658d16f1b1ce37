"""What a block holds besides entries where a policy asks queries: the last ones, and which tokens the entries are.

Both follow from the tokens before, as the entries do: a request that is preempted writes them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from kvpolicy_kernels.column_scores import column_scores
from kvpolicy_kernels.segments import Chunk, Segments
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Observation:
    """Rows behind the entries of one layer's blocks.

    window, num_q_heads, head_dim: the last queries of each query head, and their size
    rows:   of a block
    first:  its row at which the queries begin, two in a row; that of token t has the place `t % window`
    places: int64 [H], its row at which the positions of each KV head's entries begin, int32
    """

    window: int
    num_q_heads: int
    head_dim: int
    rows: int
    first: int
    places: Tensor

    @classmethod
    def behind(
        cls, slots: Sequence[int], rows: int, window: int, num_q_heads: int, head_dim: int, device: torch.device | str
    ) -> Observation:
        """slots: entries of each KV head in a block"""
        first = sum(slots)
        sizes = torch.tensor([_rows_of_positions(n, head_dim) for n in slots])
        places = first + _rows_of_queries(window, num_q_heads) + sizes.cumsum(0) - sizes
        return cls(window, num_q_heads, head_dim, rows, first, places.to(device))

    @staticmethod
    def size(slots: Sequence[int], window: int, num_q_heads: int, head_dim: int) -> int:
        """Rows that it takes."""
        return _rows_of_queries(window, num_q_heads) + sum(_rows_of_positions(n, head_dim) for n in slots)

    def vectors_of_queries(self, row: Tensor, tokens: Tensor) -> Tensor:
        """Where queries are among `vectors`, int64 [..., N, num_q_heads].

        row: int64 [..., N], at which those of a block begin;  tokens: int64 [N]
        """
        begin = row * 2 + tokens % self.window * self.num_q_heads
        return begin[..., None] + torch.arange(self.num_q_heads, device=tokens.device)

    def write_queries(self, query: Tensor, cache: Tensor, block: Tensor, begin: int) -> None:
        """The last of the queries [n, num_q_heads, D], whose first is of token `begin`."""
        last = query[-self.window :]
        end = begin + len(query)
        tokens = torch.arange(end - len(last), end, device=query.device)
        vectors(cache)[self.vectors_of_queries(block * self.rows + self.first, tokens)] = last

    def positions(
        self, cache: Tensor, block: Tensor, lengths: Tensor, index: Tensor, count: int, period: int
    ) -> Tensor:
        """Tokens of the entries [H, n], where a cut is to be made before token `count`; -1 behind a head's last.

        lengths: int64 [H];  index: arange(n)
        """
        # since the last cut nothing was given up, and a head that was never cut has all of its tokens
        entry = torch.minimum(index, lengths[:, None] - 1)
        known = _integers(cache)[self._places_of_positions(cache, block) + entry].long()
        since = count - lengths[:, None] + index
        is_older = (index < lengths[:, None] - period) & (lengths[:, None] < count)
        return torch.where(index < lengths[:, None], torch.where(is_older, known, since), -1)

    def write_positions(self, positions: Tensor, cache: Tensor, block: Tensor, heads: Tensor, entries: Tensor) -> None:
        """positions, heads, entries: int64 [K]"""
        _integers(cache)[self._places_of_positions(cache, block)[heads, 0] + entries] = positions.int()

    def mass(
        self, cache: Tensor, block: Tensor, segments: Segments, count: int, scale: float, softcap: float | None
    ) -> Tensor:
        """What the last queries before token `count` attend to, summed: float32 [1, H, n], n the longest segment.

        segments: the entries of the request, the window's tokens the last of each head
        """
        tokens = torch.arange(count - self.window, count, device=cache.device)
        query = vectors(cache)[self.vectors_of_queries(block * self.rows + self.first, tokens)]
        before = segments.lengths - self.window
        last = (segments.starts + before)[:, None] + torch.arange(self.window, device=cache.device)
        chunk = Chunk(segments.keys[last][None], segments.values[last][None])
        older = Segments(segments.keys, segments.values, segments.starts, before)
        found = column_scores(query.transpose(0, 1)[None], older, chunk, scale=scale, softcap=softcap)
        # the window stands behind the longest head's entries; here it stands behind each head's own
        longest = found.shape[2] - self.window
        index = torch.arange(found.shape[2], device=cache.device)
        behind = (index - before[:, None] + longest).clamp(max=found.shape[2] - 1)
        return found.gather(2, torch.where(index < before[:, None], index, behind)[None])

    def _places_of_positions(self, cache: Tensor, block: Tensor) -> Tensor:
        """Of `_integers`, int64 [H, 1]."""
        in_a_row = 2 * self.head_dim * cache.element_size() // 4
        return ((block * self.rows + self.places) * in_a_row)[:, None]


def vectors(cache: Tensor) -> Tensor:
    """Keys and values of all blocks in turn, [2 * R, D], as a view."""
    return cache.view(-1, cache.shape[-1])


def _integers(cache: Tensor) -> Tensor:
    """The same memory as int32."""
    return cache.view(torch.int32).view(-1)


def _rows_of_queries(window: int, num_q_heads: int) -> int:
    return -(-window * num_q_heads // 2)


def _rows_of_positions(slots: int, head_dim: int) -> int:
    """A row of 16 bits a number has room for as many as a key has numbers, in 32 bits for twice as many."""
    return -(-slots // head_dim)
