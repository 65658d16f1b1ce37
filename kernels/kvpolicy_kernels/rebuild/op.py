"""Checks the arguments and picks the backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvpolicy_kernels.backend import Backend, uses_triton
from kvpolicy_kernels.rebuild.reference import reference_rebuild


class Chosen(NamedTuple):
    """Which candidates each segment keeps, and where they lie then.

    columns: int64 [S, most], rows contiguous: the candidates of a segment are the `width` columns of its entries and,
        behind them, the tokens of its sequence; entries that it has not are never chosen
    starts, counts: int64 [S], the first row of each segment and how many it has then, at most `most`
    former: int64 [S], the first row of each segment before
    """

    columns: Tensor
    starts: Tensor
    counts: Tensor
    former: Tensor
    width: int


def rebuild(
    outs: Sequence[Tensor],
    chosen: Chosen,
    held: Sequence[Tensor] | None,
    fresh: Sequence[Tensor] | None,
    numbers: Sequence[tuple[Tensor, Tensor]] = (),
    *,
    backend: Backend = "auto",
) -> None:
    """In place: row `starts[s] + j` of every out becomes candidate `columns[s, j]` of segment s, j below `counts[s]`.

    outs: each [R, D] with contiguous rows, and a D of its own
    held: of each out the arena [R2, D] before, with contiguous rows and no memory shared; None: rows whose candidates
        are entries are left alone
    fresh: of each out the chunk [B, H, n, D], with any strides; None: rows whose candidates are tokens are left alone
    numbers: pairs of an out [R] and a table [S, width + n] with contiguous rows, which has a number for each candidate

    The bits are exact where dtypes agree. Tables lie on the device, and Triton reads nothing back.
    Raises `ValueError` for shapes that do not fit, and for a backend that cannot run here.
    """
    count = chosen.starts.shape[0]  # sooner there than its len()
    if chosen.columns.dim() != 2 or any(
        table.dtype != torch.int64 or table.shape[0] != count for table in (chosen.columns, *chosen[1:4])
    ):
        raise ValueError(f"rebuild: expected columns int64 [{count}, most], and int64 [{count}] of each table")
    if chosen.columns.shape[1] > 1 and chosen.columns.stride(1) != 1:
        raise ValueError(f"rebuild: expected columns with contiguous rows, got strides {list(chosen.columns.stride())}")
    for sources, dims in ((held, 2), (fresh, 4)):
        shapes = [] if sources is None else [(source.dim(), source.shape[-1]) for source in sources]
        if sources is not None and shapes != [(dims, out.shape[1]) for out in outs]:
            raise ValueError(
                f"rebuild: outs {[list(out.shape) for out in outs]} need sources of {dims} dimensions as wide, got "
                f"{[list(source.shape) for source in sources]}"
            )
    for out in (*outs, *(held or ())):
        if out.dim() != 2 or (out.shape[1] > 1 and out.stride(1) != 1):
            raise ValueError(
                f"rebuild: expected [R, D] with contiguous rows, got {list(out.shape)}, strides {list(out.stride())}"
            )
    for out, table in numbers:
        if (
            out.dim() != 1
            or table.dim() != 2
            or table.shape[0] != count
            or (table.shape[1] > 1 and table.stride(1) != 1)
        ):
            raise ValueError(
                f"rebuild: expected numbers [R] and [{count}, N] with contiguous rows, got {list(out.shape)} and "
                f"{list(table.shape)}"
            )
    if uses_triton("rebuild", backend, chosen.columns):
        from kvpolicy_kernels.rebuild.kernel import triton_rebuild

        triton_rebuild(outs, chosen, held, fresh, numbers)
    else:
        reference_rebuild(outs, chosen, held, fresh, numbers)
