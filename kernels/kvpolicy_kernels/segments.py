"""What the ops over an arena share: the checks of their arguments."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_QUERIES = 16
"""Queries of one call that the Triton kernel of `decode_attention` takes."""

MAX_ROWS = 128
"""Queries times query heads of a group, likewise."""


MAX_DIM = 256
"""The larger of its key and value dims."""


def beyond_kernel(query: Tensor, keys: Tensor, values: Tensor, num_kv_heads: int) -> str | None:
    """What of these arguments is beyond that kernel, None if nothing is. query: [B, num_q_heads, n, D]."""
    n, group = query.shape[2], query.shape[1] // num_kv_heads
    if n > MAX_QUERIES or n * group > MAX_ROWS:
        return f"{n} queries of {group} heads a group, where {MAX_QUERIES} queries and {MAX_ROWS} rows are the most"
    if max(keys.shape[1], values.shape[1]) > MAX_DIM:
        return f"head dims {keys.shape[1]} and {values.shape[1]}, where {MAX_DIM} is the most"
    dtypes = {query.dtype, keys.dtype, values.dtype}
    if len(dtypes) > 1 or query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"queries, keys and values of {', '.join(sorted(map(str, dtypes)))}, not of one of float32 and 16 bits"
    return None


def check_segments(
    op: str, query: Tensor, keys: Tensor, starts: Tensor, lengths: Tensor, sink_logits: Tensor | None
) -> int:
    """Returns the number of KV heads; raises `ValueError` for shapes that do not fit."""
    batch, num_q_heads, _, dim = query.shape
    if keys.dim() != 2 or keys.shape[1] != dim or not keys.is_contiguous():
        raise ValueError(
            f"{op}: query {list(query.shape)} needs contiguous keys [R, {dim}], got {list(keys.shape)} "
            f"with strides {list(keys.stride())}"
        )
    segments = starts.shape[0]
    if starts.shape != lengths.shape or segments == 0 or segments % batch or num_q_heads % (segments // batch):
        raise ValueError(
            f"{op}: starts and lengths must be [{batch} * num_kv_heads], with a num_kv_heads that divides "
            f"{num_q_heads}, got {list(starts.shape)} and {list(lengths.shape)}"
        )
    if sink_logits is not None and sink_logits.shape != (num_q_heads,):
        raise ValueError(f"{op}: expected sink_logits [{num_q_heads}], got {list(sink_logits.shape)}")
    return segments // batch


def check_chunk(op: str, query: Tensor, num_kv_heads: int, chunk_key: Tensor | None, chunk_mask: Tensor | None) -> None:
    """Raises `ValueError` for shapes that do not fit."""
    batch, _, n, dim = query.shape
    if chunk_key is None:
        if chunk_mask is not None:
            raise ValueError(f"{op}: chunk_mask needs a chunk, got none")
        return
    m = chunk_key.shape[2]
    if chunk_key.shape != (batch, num_kv_heads, m, dim):
        raise ValueError(f"{op}: expected chunk_key {[batch, num_kv_heads, 'm', dim]}, got {list(chunk_key.shape)}")
    if chunk_mask is not None and (chunk_mask.shape[0] not in (1, batch) or chunk_mask.shape[1:] != (1, n, m)):
        raise ValueError(f"{op}: expected chunk_mask [1 or {batch}, 1, {n}, {m}], got {list(chunk_mask.shape)}")


def check_attention(
    op: str,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    lengths: Tensor,
    sink_logits: Tensor | None,
    chunk_key: Tensor | None,
    chunk_value: Tensor | None,
    chunk_mask: Tensor | None,
) -> int:
    """Returns the number of KV heads; raises `ValueError` for shapes and strides that do not fit."""
    num_kv_heads = check_segments(op, query, keys, starts, lengths, sink_logits)
    if values.dim() != 2 or values.shape[0] != keys.shape[0] or not values.is_contiguous():
        raise ValueError(
            f"{op}: expected contiguous values [{keys.shape[0]}, Dv], got {list(values.shape)} "
            f"with strides {list(values.stride())}"
        )
    if (chunk_key is None) != (chunk_value is None):
        raise ValueError(f"{op}: chunk_key and chunk_value come together, got one of them")
    check_chunk(op, query, num_kv_heads, chunk_key, chunk_mask)
    if chunk_key is not None and chunk_value is not None:
        expected = (*chunk_key.shape[:3], values.shape[1])
        if chunk_value.shape != expected:
            raise ValueError(f"{op}: expected chunk_value {list(expected)}, got {list(chunk_value.shape)}")
    return num_kv_heads
