"""Checks the arguments and picks the backend."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor

from kvpolicy_kernels.backend import Backend, uses_triton
from kvpolicy_kernels.column_scores.reference import reference_column_scores
from kvpolicy_kernels.segments import (
    Chunk,
    EncodedSegments,
    ExactCopies,
    Segments,
    check_encoded,
    check_segments,
)

Reduction = Literal["sum", "max"]
Entries = TypeVar("Entries", Segments, EncodedSegments)


def column_scores(
    query: Tensor,
    segments: Segments | EncodedSegments,
    chunk: Chunk | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    query_mask: Tensor | None = None,
    reduction: Reduction = "sum",
    power: float = 1.0,
    longest: int | None = None,
    copies: ExactCopies | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """The attention of every entry: `ragged_attention`'s weights, summed over the queries and the query group.

    The last queries of a prompt give the scores of SnapKV (arXiv:2404.14469), all of them those of H2O
    (arXiv:2306.14048), and the query of a decoding step what H2O adds to them. The largest weight instead of the sum
    is what KVzip (arXiv:2505.23416) asks for, and KV-Compress (arXiv:2410.00161) sums squares.

    segments: entries, or their codes of 8 or 4 bits, which count as what they decode to; Triton reads the codes
    query_mask: bool [B, n], True counts; queries of padding contribute nothing, whatever they hold
    reduction: "sum", or "max" for the largest weight that any query of the group gives
    power: > 0; each weight is raised to it first
    longest: `lengths.max()`, from a caller who knows it; Triton does not read it from the device then
    copies: of entries that are codes, in whose places they count; every query sees them
    backend: "auto" is Triton on CUDA, where the tensors have one dtype and D <= 256, and torch elsewhere; "max" is
        torch everywhere
    The other arguments are those of `ragged_attention`; values are not read.

    Returns float32 [B, num_kv_heads, N] with N = lengths.max() + m: column j below the segment's length is its entry
    j, column lengths.max() + j is token j of the chunk, and all others are exactly 0. A learned sink takes its share
    of the mass. Equal arguments give equal bits. Memory beside the result is O(N) for a block of queries in torch,
    and O(n * num_q_heads) in Triton.

    Tables on the CPU need no word from the device. Tables on the device are read once for N where `longest` is None,
    which waits for it, and Triton checks neither them nor `longest`.
    Raises `ValueError` for shapes that do not fit, for a power that is not above 0, for another `longest`, for segments
    that leave the arena, and for a backend that cannot run here.
    """
    if isinstance(segments, EncodedSegments):
        check_encoded("column_scores", query, segments, chunk, sink_logits, copies)
    else:
        check_segments("column_scores", query, segments, chunk, sink_logits)
        if copies is not None:
            raise ValueError("column_scores: exact copies belong to entries that are encoded, got Segments")
    if query_mask is not None and query_mask.shape != (query.shape[0], query.shape[2]):
        raise ValueError(
            f"column_scores: expected query_mask {[query.shape[0], query.shape[2]]}, got {list(query_mask.shape)}"
        )
    if reduction not in get_args(Reduction):
        raise ValueError(f"column_scores: expected reduction 'sum' or 'max', got {reduction!r}")
    if not 0 < power < math.inf:
        raise ValueError(f"column_scores: expected a finite power above 0, got {power}")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    unsupported = "reduction='max'" if reduction == "max" else _unsupported(query, segments, chunk, copies)
    triton = uses_triton("column_scores", backend, query, unsupported)
    if longest is None or not triton or segments.lengths.device.type == "cpu":
        most = int(segments.lengths.max())
        if longest not in (None, most):
            raise ValueError(f"column_scores: longest is {longest}, but the longest segment has {most} entries")
        longest = most
    options = softcap, sink_logits, query_mask, power
    if triton and isinstance(segments, EncodedSegments):
        from kvpolicy_kernels.column_scores.codes.kernel import triton_coded_scores

        coded: Tensor = triton_coded_scores(
            query, _on_device(segments, query.device), longest, chunk, scale, *options, copies
        )
        return coded
    if isinstance(segments, EncodedSegments):
        segments = segments.decoded(query.dtype, copies)
    if triton:
        from kvpolicy_kernels.column_scores.kernel import triton_column_scores

        out: Tensor = triton_column_scores(query, _on_device(segments, query.device), longest, chunk, scale, *options)
        return out
    return reference_column_scores(query, segments, chunk, scale, *options, largest=reduction == "max")


def _unsupported(
    query: Tensor, segments: Segments | EncodedSegments, chunk: Chunk | None, copies: ExactCopies | None
) -> str | None:
    keys = [segments.keys] if isinstance(segments, Segments) else []
    keys += [x.key for x in (chunk, copies) if x is not None]
    dtypes = {query.dtype, *(key.dtype for key in keys)}
    if len(dtypes) > 1 or query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"query and keys must both be float32, bfloat16 or float16, got {', '.join(sorted(map(str, dtypes)))}"
    return f"head dim {query.shape[-1]} is above 256" if query.shape[-1] > 256 else None


def _on_device(segments: Entries, device: torch.device) -> Entries:
    """Tables of the CPU are checked; pinned ones can be copied inside a CUDA graph, so each goes by itself."""
    if segments.lengths.device.type == "cpu" and segments.starts.device.type == "cpu":
        segments.bounds()
    starts, lengths = (table.to(device, non_blocking=True) for table in (segments.starts, segments.lengths))
    return replace(segments, starts=starts, lengths=lengths)
