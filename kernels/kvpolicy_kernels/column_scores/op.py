"""Checks the arguments and picks the backend."""

from __future__ import annotations

from torch import Tensor

from kvpolicy_kernels.column_scores.reference import reference_column_scores
from kvpolicy_kernels.ragged_attention.op import check_chunk, check_segments


def column_scores(
    query: Tensor,
    keys: Tensor,
    starts: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    chunk_key: Tensor | None = None,
    chunk_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
) -> Tensor:
    """The attention mass of every entry: `ragged_attention`'s weights, summed over the queries and the query group.

    query_mask: bool [B, n], True counts; queries of padding contribute nothing
    The other arguments are those of `ragged_attention`.

    Returns float32 [B, num_kv_heads, N] with N = lengths.max() + m: column j below the segment's length is its entry
    j, column lengths.max() + j is token j of the chunk, and all others are exactly 0. A learned sink takes its share
    of the mass. Memory beside the result is O(N) for a block of queries.
    Raises `ValueError` for shapes that do not fit and segments that leave the arena.
    """
    num_kv_heads = check_segments("column_scores", query, keys, starts, lengths, sink_logits)
    check_chunk("column_scores", query, num_kv_heads, chunk_key, chunk_mask)
    if query_mask is not None and query_mask.shape != (query.shape[0], query.shape[2]):
        raise ValueError(
            f"column_scores: expected query_mask {[query.shape[0], query.shape[2]]}, got {list(query_mask.shape)}"
        )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return reference_column_scores(
        query, keys, starts, lengths, scale, softcap, sink_logits, chunk_key, chunk_mask, query_mask
    )
