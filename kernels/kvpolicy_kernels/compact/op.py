"""Checks the arguments and picks the backend."""

from __future__ import annotations

from torch import Tensor

from kvpolicy_kernels.compact.reference import reference_compact


def compact(out: Tensor, out_rows: Tensor, source: Tensor, source_rows: Tensor) -> None:
    """In place `out[out_rows] = source[source_rows]`, cast to the dtype of `out`; the moved bits are exact otherwise.

    out: [R] or [R, D], not sharing memory with `source`
    source: an arena [R2] or [R2, D], or a chunk of new tokens [B, H, n] or [B, H, n, D] with any strides, of which
        `source_rows` counts the flattened (b, h, t)
    out_rows, source_rows: int64 [N] on the device of `out`; `out_rows` distinct

    Raises `ValueError` for shapes that do not fit.
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
    reference_compact(out, out_rows, source, source_rows)
