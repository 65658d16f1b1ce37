"""Checks the arguments and picks the backend."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpolicy_kernels.backend import Backend, uses_triton
from kvpolicy_kernels.evict.reference import Spans, reference_evict, reference_rank


def evict(
    scores: Tensor | None,
    positions: Tensor,
    starts: Tensor,
    lengths: Tensor,
    seen: Tensor,
    *,
    num_sink_tokens: int = 0,
    recent_window: int = 0,
    spans: Spans = (),
    backend: Backend = "auto",
) -> Tensor:
    """The slot of each segment's worst entry: the one that goes where one must.

    Entries outside the recent window go first, then those inside, then pinned ones: sink tokens and those of `spans`.
    Within the first tier the lowest score goes, and at equal scores the oldest; in the others the oldest, whatever its
    score. -0 equals 0.

    scores: float32 [R], without NaN in an entry, or None: then the oldest goes
    positions: int32 or int64 [R], below 2**29, distinct within a segment; -1 for an entry that is never the worst
    starts, lengths: int64 [S], contiguous, on the arenas' device: segment i holds the rows from `starts[i]` to
        `starts[i] + lengths[i] - 1`. Rows outside every segment may hold anything.
    seen: int64 [B] or [S], likewise, with S a multiple of B: tokens that each sequence, or segment, has seen
    num_sink_tokens: first positions, which are pinned
    recent_window: last positions, those from `seen - recent_window` on
    spans: (begin, end) positions, which are pinned
    backend: "auto" is Triton on CUDA and torch elsewhere; torch on CUDA waits for the device

    Returns int64 [S], counted from the segment's start; -1 for a segment without entries. Equal arguments give equal
    slots. Triton waits for nothing, so that a CUDA graph can hold the call, and does not check that segments lie in the
    arena; it launches once where the arena has up to 512 rows a segment, and twice where it has more.
    Raises `ValueError` for shapes and dtypes that do not fit, and for a backend that cannot run here.
    """
    _check(scores, positions, starts, lengths, seen)
    arguments = (scores, positions, starts, lengths, seen, num_sink_tokens, recent_window, spans)
    if uses_triton("evict", backend, starts):
        from kvpolicy_kernels.evict.kernel import triton_evict

        slots: Tensor = triton_evict(*arguments)
        return slots
    return reference_evict(*arguments)


def evict_into(
    rows: Tensor,
    scores: Tensor | None,
    positions: Tensor,
    starts: Tensor,
    lengths: Tensor,
    seen: Tensor,
    *,
    num_sink_tokens: int = 0,
    recent_window: int = 0,
    spans: Spans = (),
    backend: Backend = "auto",
) -> None:
    """Fills in where it is -1, in place, the arena's row of the segment's worst entry; other segments are left alone.

    rows: int64 [S], contiguous; no segment without entries is asked for

    The other arguments and errors are those of `evict`, and the launches too.
    """
    _check(scores, positions, starts, lengths, seen)
    if rows.dtype != torch.int64 or rows.shape != starts.shape or not rows.is_contiguous():
        raise ValueError(
            f"evict_into: expected rows contiguous int64 {list(starts.shape)}, got {rows.dtype} {list(rows.shape)} "
            f"with strides {list(rows.stride())}"
        )
    arguments = (scores, positions, starts, lengths, seen, num_sink_tokens, recent_window, spans)
    if uses_triton("evict_into", backend, starts):
        from kvpolicy_kernels.evict.kernel import triton_evict

        triton_evict(*arguments, rows)
    else:
        rows.copy_(torch.where(rows < 0, starts + reference_evict(*arguments), rows))


def rank(
    scores: Tensor | None,
    positions: Tensor,
    starts: Tensor,
    lengths: Tensor,
    seen: Tensor,
    *,
    width: int,
    fresh: Tensor | None = None,
    num_sink_tokens: int = 0,
    recent_window: int = 0,
    spans: Spans = (),
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """The positions of all candidates of a selection, and their keys in the order in which they are given up.

    The candidates of a segment are its entries, as far as there are any of `width` columns, and the n new tokens of its
    sequence. Keys are those by which `evict` finds the worst: the larger is kept.

    scores: float32 [S, width + n], rows contiguous, or None: then the most recent are kept
    width: at least the longest length
    fresh: int64 [B, n], rows contiguous, positions of new tokens, -1 for padding; None for none

    The other arguments are those of `evict`. Returns positions and keys, int64 [S, width + n] both, and -1 in both for
    a candidate that is absent. Triton waits for nothing.
    Raises `ValueError` for shapes and dtypes that do not fit, and for a backend that cannot run here.
    """
    _check(None, positions, starts, lengths, seen)
    segments = starts.shape[0]  # sooner there than its len()
    sequences, count = (1, 0) if fresh is None else fresh.shape
    if fresh is not None and (fresh.dtype != torch.int64 or not sequences or segments % sequences):
        raise ValueError(
            f"rank: expected fresh int64 [B, n] with a B that divides {segments} segments, got {fresh.dtype} "
            f"{list(fresh.shape)}"
        )
    if scores is not None and (scores.shape != (segments, width + count) or scores.dtype != torch.float32):
        raise ValueError(
            f"rank: expected scores float32 {[segments, width + count]}, got {scores.dtype} {list(scores.shape)}"
        )
    if any(table is not None and table.shape[1] > 1 and table.stride(1) != 1 for table in (scores, fresh)):
        raise ValueError("rank: expected scores and fresh with contiguous rows")
    arguments = (scores, positions, starts, lengths, seen, width, fresh, num_sink_tokens, recent_window, spans)
    if uses_triton("rank", backend, starts):
        from kvpolicy_kernels.evict.kernel import triton_rank

        ranked: tuple[Tensor, Tensor] = triton_rank(*arguments)
        return ranked
    return reference_rank(*arguments)


def _check(scores: Tensor | None, positions: Tensor, starts: Tensor, lengths: Tensor, seen: Tensor) -> None:
    if positions.dim() != 1 or positions.dtype not in (torch.int32, torch.int64) or not positions.is_contiguous():
        raise ValueError(
            f"evict: expected positions contiguous int32 or int64 [R], got {positions.dtype} {list(positions.shape)} "
            f"with strides {list(positions.stride())}"
        )
    if scores is not None and not (
        scores.dtype == torch.float32 and scores.shape == positions.shape and scores.is_contiguous()
    ):
        raise ValueError(
            f"evict: expected scores contiguous float32 {list(positions.shape)}, got {scores.dtype} "
            f"{list(scores.shape)} with strides {list(scores.stride())}"
        )
    for name, table in (("starts", starts), ("lengths", lengths), ("seen", seen)):
        shape = starts.shape[:1] if name != "seen" else seen.shape[:1]
        if table.dtype != torch.int64 or table.shape != shape or not table.is_contiguous():
            raise ValueError(
                f"evict: expected {name} contiguous int64 {list(shape)}, got {table.dtype} {list(table.shape)} with "
                f"strides {list(table.stride())}"
            )
    count, sequences = starts.shape[0], seen.shape[0]
    if count and (not sequences or count % sequences):
        raise ValueError(f"evict: expected seen [B] with a B that divides {count} segments, got {sequences}")
