"""Checks the arguments and picks the backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvpolicy_kernels.append.reference import reference_append, reference_append_next
from kvpolicy_kernels.backend import Backend, uses_triton


def append(arenas: Sequence[Tensor], rows: Tensor, entries: Sequence[Tensor], *, backend: Backend = "auto") -> None:
    """In place `arena[rows] = entry`, cast to the arena's dtype, for each pair.

    arenas: each [R] or [R, D], with a D of its own
    rows: int64 [S] on the arenas' device, distinct; one row per segment
    entries: one per arena, [S] or [S, D] or any shape that reshapes to it, such as [B, num_kv_heads, 1, D]
    backend: "auto" is Triton on CUDA and torch elsewhere

    Raises `ValueError` for shapes or counts that do not fit, and for a backend that cannot run here.
    """
    _check_entries("append", arenas, rows.shape[0], entries)
    if uses_triton("append", backend, rows):
        from kvpolicy_kernels.append.kernel import triton_append

        triton_append(arenas, rows, entries)
    else:
        reference_append(arenas, rows, entries)


def append_next(
    arenas: Sequence[Tensor],
    entries: Sequence[Tensor],
    starts: Tensor,
    lengths: Tensor,
    capacities: Tensor,
    cursors: Tensor,
    num_pinned: int,
    *,
    slots: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """`append` to the next row of each segment, which the tables on the device tell.

    A segment below its capacity grows: the entry goes behind the others. A full one overwrites an entry: the ring's
    oldest, as `lengths[s] - num_pinned` entries behind the pinned ones take turns, or the one that `slots` names.
    Nothing but the device needs to know which, so that a CUDA graph can hold the call.

    arenas, entries: as in `append`
    starts, lengths, capacities: int64 [S], contiguous, on the arenas' device, in rows; `lengths` is updated in place
    cursors: int64 [S], likewise: the ring's oldest entry, counted from `num_pinned`; updated in place without `slots`
    num_pinned: first entries of a segment, which the ring leaves alone
    slots: int64 [S], likewise: the entry of each segment that is overwritten where it is full
    backend: "auto" is Triton on CUDA and torch elsewhere; torch on CUDA waits for the device

    Returns int64 [S], the row of each segment's entry. A full segment with nothing to overwrite, because its ring is
    empty or its slot is not one of its entries, drops the entry: its row is -1.
    Raises `ValueError` for shapes or counts that do not fit, and for a backend that cannot run here.
    """
    tables = {"starts": starts, "lengths": lengths, "capacities": capacities, "cursors": cursors, "slots": slots}
    for name, table in tables.items():
        if table is not None and not (
            table.dtype == torch.int64 and table.shape == starts.shape[:1] and table.is_contiguous()
        ):
            raise ValueError(
                f"append_next: expected {name} contiguous int64 {list(starts.shape[:1])}, got {table.dtype} "
                f"{list(table.shape)} with strides {list(table.stride())}"
            )
    _check_entries("append_next", arenas, starts.shape[0], entries)
    arguments = (arenas, entries, starts, lengths, capacities, cursors, num_pinned, slots)
    if uses_triton("append_next", backend, starts):
        from kvpolicy_kernels.append.kernel import triton_append_next

        rows: Tensor = triton_append_next(*arguments)
        return rows
    return reference_append_next(*arguments)


def _check_entries(op: str, arenas: Sequence[Tensor], num_segments: int, entries: Sequence[Tensor]) -> None:
    if len(arenas) != len(entries):
        raise ValueError(f"{op}: {len(arenas)} arenas need as many entries, got {len(entries)}")
    for arena, entry in zip(arenas, entries, strict=True):
        if arena.dim() not in (1, 2):
            raise ValueError(f"{op}: expected arenas [R] or [R, D], got {list(arena.shape)}")
        if entry.numel() != num_segments * arena.shape[1:].numel():
            raise ValueError(
                f"{op}: {num_segments} rows of an arena {list(arena.shape)} need an entry of shape "
                f"{[num_segments, *arena.shape[1:]]}, got {list(entry.shape)}"
            )
