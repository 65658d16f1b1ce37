"""Checks the arguments and picks the backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvpolicy_kernels.backend import Backend, uses_triton
from kvpolicy_kernels.compact.reference import reference_compact, reference_compact_in_place


def compact(out: Tensor, out_rows: Tensor, source: Tensor, source_rows: Tensor, *, backend: Backend = "auto") -> None:
    """In place `out[out_rows] = source[source_rows]`, cast to the dtype of `out`; the moved bits are exact otherwise.

    out: [R] or [R, D], not sharing memory with `source`
    source: an arena [R2] or [R2, D], or a chunk of new tokens [B, H, n] or [B, H, n, D] with any strides, of which
        `source_rows` counts the flattened (b, h, t)
    out_rows, source_rows: int64 [N] on the device of `out`; `out_rows` distinct
    backend: "auto" is Triton on CUDA and torch elsewhere

    Raises `ValueError` for shapes that do not fit, and for a backend that cannot run here.
    """
    if source.dim() not in (out.dim(), out.dim() + 2) or source.shape[source.dim() - out.dim() + 1 :] != out.shape[1:]:
        row = list(out.shape[1:])
        raise ValueError(
            f"compact: out {list(out.shape)} needs a source {['R', *row]} or {['B', 'H', 'n', *row]}, "
            f"got {list(source.shape)}"
        )
    if out_rows.dim() != 1 or out_rows.shape != source_rows.shape:
        raise ValueError(
            f"compact: out_rows and source_rows must both be [N], got {list(out_rows.shape)} "
            f"and {list(source_rows.shape)}"
        )
    if uses_triton("compact", backend, out):
        from kvpolicy_kernels.compact.kernel import triton_compact

        triton_compact(out, out_rows, source, source_rows)
    else:
        reference_compact(out, out_rows, source, source_rows)


def compact_in_place(
    arenas: Sequence[Tensor], starts: Tensor, columns: Tensor, counts: Tensor, *, backend: Backend = "auto"
) -> None:
    """Entry `columns[s, j]` of segment s becomes its entry j, for each j below `counts[s]`, in every arena.

    The order stays and the bits are exact. Triton needs no second arena: it moves forward, and an entry never lies
    before its new place.

    arenas: each [R] or [R, D], with a D of its own
    starts: int64 [S] on the arenas' device, the first row of each segment; segments share no row
    columns: int64 [S, most], likewise; from 0 on and ascending in a segment as far as it counts
    counts: int64 [S], likewise, at most `most`
    backend: "auto" is Triton on CUDA and torch elsewhere; torch on CUDA waits for the device

    Raises `ValueError` for shapes that do not fit, and for a backend that cannot run here. Columns that do not ascend
    raise it in torch alone: Triton does not read them first, and entries are lost.
    """
    for arena in arenas:
        if arena.dim() not in (1, 2):
            raise ValueError(f"compact_in_place: expected arenas [R] or [R, D], got {list(arena.shape)}")
    if columns.dtype != torch.int64 or columns.dim() != 2:
        raise ValueError(
            f"compact_in_place: expected columns int64 [S, most], got {columns.dtype} {list(columns.shape)}"
        )
    for name, table in {"starts": starts, "counts": counts}.items():
        if table.dtype != torch.int64 or table.shape != columns.shape[:1]:
            raise ValueError(
                f"compact_in_place: expected {name} int64 [{columns.shape[0]}], got {table.dtype} {list(table.shape)}"
            )
    if uses_triton("compact_in_place", backend, columns):
        from kvpolicy_kernels.compact.kernel import triton_compact_in_place

        triton_compact_in_place(arenas, starts, columns, counts)
    else:
        reference_compact_in_place(arenas, starts, columns, counts)
