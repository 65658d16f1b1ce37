"""The attention that entries get from a chunk's queries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from kvpolicy_kernels.column_scores import Reduction, column_scores
from kvpolicy_kernels.segments import EncodedSegments, ExactCopies, Segments
from torch import Tensor
from torch.nn.functional import pad

from kvpolicy.cache.arena import LayerArena
from kvpolicy.cache.chunk import Chunk


def attention_mass(
    arena: LayerArena, query: Tensor, chunk: Chunk, options: Mapping[str, Any], reduction: Reduction = "sum"
) -> Tensor:
    """Attention that [entries held ; chunk] get from these queries: the sum, or the largest, over queries and group.

    query: [B, num_q_heads, n, D] of the chunk's last n tokens. Returns float32 [B, H, width + len(chunk)].
    """
    return _mass(arena.read_segments, arena.width, query, chunk, options, reduction)


def _mass(
    held: tuple[Segments | EncodedSegments, ExactCopies | None],
    longest: int,
    query: Tensor,
    chunk: Chunk,
    options: Mapping[str, Any],
    reduction: Reduction = "sum",
) -> Tensor:
    """held: entries and exact copies, see `LayerArena.read_segments`"""
    (segments, copies), num_queries = held, query.shape[2]
    mask = query_mask = None
    if chunk.places.has_padding:
        mask = chunk_mask(chunk, num_queries)
        query_mask = (chunk.positions[:, -num_queries:] >= 0).to(query.device)
    tokens = chunk.masked(mask)
    return column_scores(
        query, segments, tokens, query_mask=query_mask, reduction=reduction, longest=longest, copies=copies, **options
    )


def attention_of_each(arena: LayerArena, query: Tensor, chunk: Chunk, options: Mapping[str, Any]) -> Tensor:
    """`attention_mass` of one query after the other, float32 [B, H, n, width + len(chunk)]."""
    num_queries, rows, held = query.shape[2], [], arena.read_segments
    for index in range(num_queries):
        later = num_queries - 1 - index  # tokens of the chunk that this query does not see
        seen = chunk.part(slice(0, len(chunk) - later))
        mass = _mass(held, arena.width, query[:, :, index : index + 1], seen, options)
        rows.append(pad(mass, (0, later)))
    return torch.stack(rows, 2)


def chunk_mask(chunk: Chunk, num_queries: int) -> Tensor:
    """What the chunk's last n tokens see of it: causal, padding excluded. Returns bool [B, 1, n, m]."""
    length, device = len(chunk), chunk.key.device
    columns = torch.arange(length, device=device)
    causal = columns <= columns[length - num_queries :, None]
    return (causal & (chunk.positions >= 0).to(device)[:, None]).unsqueeze(1)
