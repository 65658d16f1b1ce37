"""Checks the arguments and picks the backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from kvpolicy_kernels.backend import Backend, uses_triton
from kvpolicy_kernels.ragged_attention.decode import decode_ragged_attention
from kvpolicy_kernels.ragged_attention.reference import reference_ragged_attention
from kvpolicy_kernels.segments import beyond_kernel, check_attention


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
    backend: Backend = "auto",
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
    backend: "auto" is the Triton kernel of `decode_attention` on CUDA for the few queries that it takes, without an
        entry_mask, and torch for the rest

    Returns [B, num_q_heads, n, Dv]. Memory beside the result is O(n + lengths.max()) for a block of queries.
    Raises `ValueError` for shapes or strides that do not fit, segments that leave the arena (where the tables lie on
    the CPU), and a backend that cannot do this.
    """
    num_kv_heads = check_attention(
        "ragged_attention", query, keys, values, starts, lengths, sink_logits, chunk_key, chunk_value, chunk_mask
    )
    if entry_mask is not None and len(entry_mask) != starts.shape[0]:
        raise ValueError(f"ragged_attention: {starts.shape[0]} segments need as many masks, got {len(entry_mask)}")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    unsupported = beyond_kernel(query, keys, values, num_kv_heads) if entry_mask is None else "an entry_mask"
    if uses_triton("ragged_attention", backend, query, unsupported):
        from kvpolicy_kernels.decode_attention.kernel import triton_decode_attention

        out: Tensor = triton_decode_attention(
            query, keys, values, starts, lengths, scale, softcap, sink_logits, chunk_key, chunk_value, chunk_mask
        )[0]
        return out
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
