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
class CutHeads:
    """A request in one layer, before its token `count`, and those K KV heads that are cut back there.

    cache: of the layer;  block, count: int64 []
    heads: int64 [K];  segments: their entries, on the device
    index: arange(n), n the entries of the longest;  ends: int64 [K, 1], how many each has
    """

    cache: Tensor
    block: Tensor
    heads: Tensor
    segments: Segments
    count: Tensor
    index: Tensor

    @property
    def ends(self) -> Tensor:
        return self.segments.lengths[:, None]


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

    def positions(self, request: CutHeads, period: int) -> Tensor:
        """Tokens of the entries, int64 [K, n]; -1 behind a head's last."""
        # since the last cut nothing was given up, and a head that was never cut has all of its tokens
        index, ends, count = request.index, request.ends, request.count
        known = _integers(request.cache)[self._places_of_positions(request) + torch.minimum(index, ends - 1)].long()
        is_older = (index < ends - period) & (ends < count)
        return torch.where(index < ends, torch.where(is_older, known, count - ends + index), -1)

    def write_positions(self, positions: Tensor, request: CutHeads, columns: Tensor, kept: Tensor) -> None:
        """positions: of the entries so far, int64 [K, n];  columns: of those that stay, the first `kept` [K] of each"""
        entry = torch.minimum(request.index[: columns.shape[1]], kept[:, None] - 1)  # the last one again and again
        written = positions.gather(1, columns.gather(1, entry)).int()
        _integers(request.cache)[self._places_of_positions(request) + entry] = written

    def mass(self, request: CutHeads, scale: float, softcap: float | None) -> Tensor:
        """What the last queries before the cut attend to, summed: float32 [1, K, n]."""
        cache, segments = request.cache, request.segments
        tokens = request.count - self.window + request.index[: self.window]
        query = vectors(cache)[self.vectors_of_queries(request.block * self.rows + self.first, tokens)]
        query = query.view(self.window, len(self.places), -1, self.head_dim)[:, request.heads]
        before = segments.lengths - self.window
        last = segments.keys[(segments.starts + before)[:, None] + request.index[: self.window]][:, None]
        older = Segments(segments.keys, segments.values, segments.starts, before)
        # a sequence for each head: kernels are compiled for a number of heads, which changes from cut to cut
        found = column_scores(
            query.permute(1, 2, 0, 3), older, Chunk(last, last),  # values are not read
            scale=scale, softcap=softcap, longest=len(request.index) - self.window,
        ).transpose(0, 1)  # fmt: skip
        # the window stands behind the longest head's entries; here it stands behind each head's own
        moved = torch.where(request.index < before[:, None], 0, len(request.index) - request.ends)
        return found.gather(2, (request.index + moved).clamp(max=len(request.index) - 1)[None])

    def _places_of_positions(self, request: CutHeads) -> Tensor:
        """Of `_integers`, int64 [K, 1]."""
        in_a_row = 2 * self.head_dim * request.cache.element_size() // 4
        return ((request.block * self.rows + self.places[request.heads]) * in_a_row)[:, None]


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
