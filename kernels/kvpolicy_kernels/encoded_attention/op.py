"""Checks the arguments and picks the backend."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpolicy_kernels.attention.op import Attended, beyond_decoding
from kvpolicy_kernels.attention.plan import WorkPlan
from kvpolicy_kernels.backend import Backend, uses_triton
from kvpolicy_kernels.encoded_attention.reference import reference_encoded_attention
from kvpolicy_kernels.segments import Chunk, EncodedSegments, ExactCopies, check_encoded


def encoded_attention(
    query: Tensor,
    segments: EncodedSegments,
    chunk: Chunk | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    plan: WorkPlan | None = None,
    with_lse: bool = False,
    with_mass: bool = False,
    mass_power: float = 1.0,
    copies: ExactCopies | None = None,
    backend: Backend = "auto",
) -> Attended:
    """`decode_attention` over entries of 8 or 4 bits: what it gives for the decoded ones.

    The arguments are those of `decode_attention`, but for the segments.
    plan: which queries as few as `decode_attention` takes go by
    copies: count in the places of some entries, mass included; every query sees them
    backend: "auto" is Triton on CUDA and torch elsewhere and for what the kernels cannot do; they take rows of any
        format of 8 or 4 bits and tensors of one dtype, as those of `decode_attention` do, and any number of queries;
        with_lse and with_mass are for as few as there

    On CUDA codes are read and never written back as numbers: the query is rotated first, and the result is rotated back
    once, before it meets the chunk or the copies. Few queries have products of codes scaled afterwards; a tile of many
    makes fp16 numbers of the codes that it holds, in passes of so many queries that they take 42 MB at head dim 128,
    or of 128 queries where that is more, and parts of the result where they are too few for the device.
    Raises `ValueError` for shapes that do not fit and for a backend that cannot do this.
    """
    if segments.entry_format.bits == 16:
        raise ValueError("encoded_attention: entries of 16 bits are not encoded: give decode_attention their segments")
    num_kv_heads = check_encoded("encoded_attention", query, segments, chunk, sink_logits, copies)
    if plan is not None and plan.pieces.shape != (len(segments), 2):
        raise ValueError(
            f"encoded_attention: {len(segments)} segments need a plan whose pieces are [{len(segments)}, 2], got "
            f"{list(plan.pieces.shape)}"
        )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    many = beyond_decoding(query, num_kv_heads)
    beyond = _beyond_kernels(query, chunk, copies) or (many if with_lse or with_mass else None)
    if uses_triton("encoded_attention", backend, query, beyond):
        if many is not None:
            from kvpolicy_kernels.encoded_attention.chunk.kernel import triton_encoded_chunk_attention

            out = triton_encoded_chunk_attention(query, segments, chunk, scale, softcap, sink_logits, copies)
            return Attended(out, None, None)
        from kvpolicy_kernels.encoded_attention.kernel import triton_encoded_attention

        return Attended(
            *triton_encoded_attention(
                query, segments, chunk, scale, softcap, sink_logits, plan, with_lse, with_mass, mass_power, copies
            )
        )
    out, lse, mass = reference_encoded_attention(
        query, segments, chunk, scale, softcap, sink_logits, mass_power, copies
    )
    return Attended(out, lse if with_lse else None, mass if with_mass else None)


def _beyond_kernels(query: Tensor, *exact: Chunk | ExactCopies | None) -> str | None:
    """What of these arguments is beyond all Triton kernels, None if nothing is."""
    rows = (x for tokens in exact if tokens is not None for x in (tokens.key, tokens.value))
    dtypes = {x.dtype for x in (query, *rows)}
    if len(dtypes) > 1 or query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"queries and a chunk of {', '.join(sorted(map(str, dtypes)))}, not of one of float32 and 16 bits"
    return None
