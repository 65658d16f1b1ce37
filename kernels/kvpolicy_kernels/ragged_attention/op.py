"""Checks the arguments and picks the backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from kvpolicy_kernels.ragged_attention.decode import decode_ragged_attention
from kvpolicy_kernels.ragged_attention.reference import reference_ragged_attention


def ragged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    chunk_key: Tensor | None = None,
    chunk_value: Tensor | None = None,
    chunk_mask: Tensor | None = None,
    entry_mask: Sequence[Tensor] | None = None,
) -> Tensor:
    """Attention of each sequence's queries over the cache entries of its KV heads, and over a chunk of new tokens.

    Segment i holds the entries of sequence `i // num_kv_heads` and KV head `i % num_kv_heads`: the rows `starts[i]` to
    `starts[i] + lengths[i] - 1` of `keys` and `values`. Rows outside every segment may hold anything. Every query sees
    all entries of its segment, and the tokens of the chunk, which are not in the arena yet, under `chunk_mask`. A
    query that sees nothing returns zeros.

    query: [B, num_q_heads, n, D];  keys: [R, D];  values: [R, Dv], both contiguous
    starts, lengths: int64 [B * num_kv_heads]; a length may be 0
    scale: of the scores, default D ** -0.5;  softcap: scores become `softcap * tanh(score / softcap)`
    sink_logits: [num_q_heads], a learned logit that takes part in the softmax with a zero value (gpt-oss)
    chunk_key: [B, num_kv_heads, m, D];  chunk_value: [B, num_kv_heads, m, Dv]
    chunk_mask: bool [B or 1, 1, n, m], True is visible; default: query i sees token j iff `j <= i + m - n`
    entry_mask: one bool [n, lengths[i]] per segment, True is visible; default: all are

    Returns [B, num_q_heads, n, Dv]. Memory beside the result is O(n + lengths.max()) for a block of queries.
    Raises `ValueError` for shapes or strides that do not fit and segments that leave the arena.
    """
    num_kv_heads = check_segments("ragged_attention", query, keys, starts, lengths, sink_logits)
    if values.dim() != 2 or values.shape[0] != keys.shape[0] or not values.is_contiguous():
        raise ValueError(
            f"ragged_attention: expected contiguous values [{keys.shape[0]}, Dv], got {list(values.shape)} "
            f"with strides {list(values.stride())}"
        )
    if (chunk_key is None) != (chunk_value is None):
        raise ValueError("ragged_attention: chunk_key and chunk_value come together, got one of them")
    check_chunk("ragged_attention", query, num_kv_heads, chunk_key, chunk_mask)
    if chunk_key is not None and chunk_value is not None:
        expected = (*chunk_key.shape[:3], values.shape[1])
        if chunk_value.shape != expected:
            raise ValueError(f"ragged_attention: expected chunk_value {list(expected)}, got {list(chunk_value.shape)}")
    if entry_mask is not None and len(entry_mask) != starts.shape[0]:
        raise ValueError(f"ragged_attention: {starts.shape[0]} segments need as many masks, got {len(entry_mask)}")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if softcap is None and values.shape[1] == keys.shape[1]:  # what torch's flash attention can do
        if chunk_key is None and entry_mask is None and query.device.type == "cpu":
            return decode_ragged_attention(query, keys, values, starts, lengths, scale, sink_logits)
        if chunk_mask is None and sink_logits is None and _is_whole_prompt(query, chunk_key, lengths):
            assert chunk_key is not None and chunk_value is not None
            return F.scaled_dot_product_attention(
                query, chunk_key, chunk_value, is_causal=True, scale=scale, enable_gqa=True
            )
    return reference_ragged_attention(
        query,
        keys,
        values,
        starts,
        lengths,
        scale,
        softcap,
        sink_logits,
        chunk_key,
        chunk_value,
        chunk_mask,
        entry_mask,
    )


def _is_whole_prompt(query: Tensor, chunk_key: Tensor | None, lengths: Tensor) -> bool:
    return chunk_key is not None and chunk_key.shape[2] == query.shape[2] and not bool(lengths.any())


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
