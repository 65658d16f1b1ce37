"""Checks the arguments and picks the backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kvpolicy_kernels.attention.cpu import cpu_attention
from kvpolicy_kernels.attention.plan import WorkPlan
from kvpolicy_kernels.attention.reference import reference_decode_attention, reference_ragged_attention
from kvpolicy_kernels.backend import Backend, uses_triton
from kvpolicy_kernels.segments import BlockSegments, Chunk, Segments, check_segments

MAX_QUERIES = 16
"""Queries of one call that the Triton kernel of a decoding step takes."""

MAX_ROWS = 128
"""Queries times query heads of a group, likewise."""

MAX_DIM = 256
"""The larger of its key and value dims."""


class Attended(NamedTuple):
    """What `decode_attention` returns.

    out:  [B, num_q_heads, n, Dv]
    lse:  float32 [B, num_q_heads, n], log of the sum over all that a query sees, its sink included; -inf for nothing
    mass: float32 [R], for each row of the arena its attention, raised to `mass_power` and summed over queries and query
        group; 0 outside segments
    """

    out: Tensor
    lse: Tensor | None
    mass: Tensor | None


def ragged_attention(
    query: Tensor,
    segments: Segments,
    chunk: Chunk | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    entry_mask: Sequence[Tensor] | None = None,
    plan: WorkPlan | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Attention of each sequence's queries over the cache entries of its KV heads, and over a chunk of new tokens.

    Every query sees all entries of its segment, and the tokens of the chunk under its mask. A query that sees nothing
    returns zeros.

    query: [B, num_q_heads, n, D]
    scale: of the scores, default D ** -0.5;  softcap: scores become `softcap * tanh(score / softcap)`
    sink_logits: [num_q_heads], a learned logit that takes part in the softmax with a zero value (gpt-oss)
    entry_mask: one bool [n, lengths[i]] per segment, True is visible; default: all are
    plan: of `plan_work` for these segments, which queries as few as `decode_attention` takes go by; None makes one
    backend: "auto" is Triton on CUDA and torch elsewhere. Triton takes any number of queries, head dims up to 256, and
        tensors of one dtype: float32, bfloat16 or float16. A whole prompt, causal and without entries, goes to torch's
        flash attention, if the tables lie on the CPU

    Returns [B, num_q_heads, n, Dv]. Memory beside the result is O(n + lengths.max()) for a block of queries in torch,
    and in Triton nothing, or where the queries are too few for the device, float32 parts of the result.
    The tables may lie on the device, and then Triton reads nothing back: neither segments that leave the arena nor an
    entry_mask of other lengths is noticed.
    Raises `ValueError` for shapes or strides that do not fit, segments that leave the arena, and a backend that cannot
    do this.
    """
    num_kv_heads = check_segments("ragged_attention", query, segments, chunk, sink_logits)
    _check_plan("ragged_attention", plan, segments)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    plain = chunk is None and entry_mask is None and softcap is None
    same_dims = segments.values.shape[1] == segments.keys.shape[1]
    if plain and same_dims and query.device.type == "cpu" and backend in ("auto", "torch"):
        return cpu_attention(query, segments, scale, sink_logits)
    few = entry_mask is None and beyond_decoding(query, num_kv_heads) is None
    triton = uses_triton("ragged_attention", backend, query, _beyond_kernels(query, segments, chunk))
    on_cpu = segments.lengths.device.type == "cpu"  # else only what waits for the device anyway looks at the lengths
    if entry_mask is not None:
        _check_entry_mask(entry_mask, query.shape[2], segments, reads_lengths=on_cpu or not triton)
    by_torch = not triton or (on_cpu and backend == "auto")
    if chunk is not None and by_torch and _is_whole_prompt(query, segments, chunk, softcap, sink_logits):
        return F.scaled_dot_product_attention(
            query, chunk.key, chunk.value, is_causal=True, scale=scale, enable_gqa=True
        )
    if triton:
        out: Tensor
        if few:
            from kvpolicy_kernels.attention.kernel import triton_attention

            out = triton_attention(query, segments, chunk, scale, softcap, sink_logits, plan)[0]
        else:
            from kvpolicy_kernels.attention.chunk.kernel import triton_chunk_attention

            out = triton_chunk_attention(query, segments, chunk, scale, softcap, sink_logits, entry_mask)
        return out
    return reference_ragged_attention(query, segments, chunk, scale, softcap, sink_logits, entry_mask)


def decode_attention(
    query: Tensor,
    segments: Segments | BlockSegments,
    chunk: Chunk | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    plan: WorkPlan | None = None,
    with_lse: bool = False,
    with_mass: bool = False,
    mass_power: float = 1.0,
    backend: Backend = "auto",
) -> Attended:
    """`ragged_attention` for the few queries of a decoding step, a rejected draft, or a short turn.

    The arguments up to `sink_logits` are those of `ragged_attention`. The tables of the segments may lie on the device,
    and then nothing is read back. Segments that leave the arena are noticed on the CPU only. Where entries are in
    blocks, all tables lie on the query's device, and there is no mass.

    plan: of `plan_work` for these segments, to be used again from step to step; None makes one
    with_lse, with_mass: what to return besides; `mass` covers entries, not the chunk
    mass_power: above 0, what attention is raised to before it is summed
    backend: "auto" is Triton on CUDA and torch elsewhere. Triton takes 16 queries at most, and 128 together with the
        query heads of a group, head dims up to 256, and tensors of one dtype: float32, bfloat16 or float16

    On CUDA the key and value of an entry are read once, for all queries of its group, and equal work goes to every
    multiprocessor whatever the lengths: split-K as in Flash-Decoding (Dao et al., 2023) under the schedule of
    `WorkPlan`. The result is the same, bit by bit, for the same plan and lengths.
    Raises `ValueError` for shapes that do not fit and for a backend that cannot do this.
    """
    num_kv_heads = check_segments("decode_attention", query, segments, chunk, sink_logits)
    if with_mass and isinstance(segments, BlockSegments):
        raise ValueError("decode_attention: with_mass needs Segments, got BlockSegments, whose entries have no mass")
    _check_plan("decode_attention", plan, segments)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    beyond = beyond_decoding(query, num_kv_heads) or _beyond_kernels(query, segments, chunk)
    if uses_triton("decode_attention", backend, query, beyond):
        from kvpolicy_kernels.attention.kernel import triton_attention

        return Attended(
            *triton_attention(
                query, segments, chunk, scale, softcap, sink_logits, plan, with_lse, with_mass, mass_power
            )
        )
    if isinstance(segments, BlockSegments):
        segments = segments.gathered()
    out, lse, mass = reference_decode_attention(query, segments, chunk, scale, softcap, sink_logits, mass_power)
    return Attended(out, lse if with_lse else None, mass if with_mass else None)


def _check_plan(op: str, plan: WorkPlan | None, segments: Segments | BlockSegments) -> None:
    if plan is not None and plan.pieces.shape != (len(segments), 2):
        raise ValueError(
            f"{op}: {len(segments)} segments need a plan whose pieces are [{len(segments)}, 2], got "
            f"{list(plan.pieces.shape)}; a plan of several layers is taken layer by layer: plan.layer(i)"
        )


def _check_entry_mask(entry_mask: Sequence[Tensor], n: int, segments: Segments, reads_lengths: bool) -> None:
    if len(entry_mask) != len(segments):
        raise ValueError(f"ragged_attention: {len(segments)} segments need as many masks, got {len(entry_mask)}")
    lengths = segments.lengths.tolist() if reads_lengths else [mask.shape[-1] for mask in entry_mask]
    for i, (mask, length) in enumerate(zip(entry_mask, lengths, strict=True)):
        if mask.shape != (n, length):
            raise ValueError(f"ragged_attention: expected entry_mask[{i}] {[n, length]}, got {list(mask.shape)}")


def beyond_decoding(query: Tensor, num_kv_heads: int) -> str | None:
    """What of these queries is beyond the Triton kernel of a decoding step, None if nothing is."""
    n, group = query.shape[2], query.shape[1] // num_kv_heads
    if n > MAX_QUERIES or n * group > MAX_ROWS:
        return f"{n} queries of {group} heads a group, where {MAX_QUERIES} queries and {MAX_ROWS} rows are the most"
    return None


def _beyond_kernels(query: Tensor, segments: Segments | BlockSegments, chunk: Chunk | None) -> str | None:
    """What of these arguments is beyond both Triton kernels, None if nothing is."""
    key_dim, value_dim = segments.keys.shape[1], segments.values.shape[1]
    if max(key_dim, value_dim) > MAX_DIM:
        return f"head dims {key_dim} and {value_dim}, where {MAX_DIM} is the most"
    tensors = [query, segments.keys, segments.values, *(() if chunk is None else (chunk.key, chunk.value))]
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1 or query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"queries, keys and values of {', '.join(sorted(map(str, dtypes)))}, not of one of float32 and 16 bits"
    return None


def _is_whole_prompt(
    query: Tensor, segments: Segments, chunk: Chunk, softcap: float | None, sink_logits: Tensor | None
) -> bool:
    """Whether this is causal attention of a chunk alone, such as torch's flash attention does."""
    if chunk.mask is not None or softcap is not None or sink_logits is not None or len(chunk) != query.shape[2]:
        return False
    return segments.values.shape[1] == segments.keys.shape[1] and not bool(segments.lengths.any())
