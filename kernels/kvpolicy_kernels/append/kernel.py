"""Triton: one program a segment writes the segment's entry into every arena, in one launch.

Nothing but a segment's own program reads or writes its tables.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpolicy_kernels.backend import LAUNCH


@triton.jit
def _load_entry(entry_ptrs, strides, i_s, DIMS: tl.constexpr):
    """A tile for each arena, all of them loaded before one is stored, so that the loads wait together."""
    tiles = ()
    for i in tl.static_range(len(DIMS)):
        o_d = tl.arange(0, triton.next_power_of_2(DIMS[i])).to(tl.int64)
        # [BLOCK_D]
        tiles += (tl.load(entry_ptrs[i] + i_s * strides[i][0] + o_d * strides[i][1], mask=o_d < DIMS[i]),)
    return tiles


@triton.jit
def _store_entry(arena_ptrs, strides, row, tiles, DIMS: tl.constexpr):
    for i in tl.static_range(len(DIMS)):
        o_d = tl.arange(0, triton.next_power_of_2(DIMS[i])).to(tl.int64)
        tl.store(
            arena_ptrs[i] + row * strides[i][0] + o_d * strides[i][1],
            tiles[i].to(arena_ptrs[i].dtype.element_ty),
            mask=o_d < tl.where(row >= 0, DIMS[i], 0),  # the interpreter of triton 3.9 takes no scalar & [BLOCK_D]
        )


@triton.jit
def _append_kernel(rows_ptr, arena_ptrs, entry_ptrs, arena_strides, entry_strides, DIMS: tl.constexpr):
    i_s = tl.program_id(0).to(tl.int64)
    tiles = _load_entry(entry_ptrs, entry_strides, i_s, DIMS)
    _store_entry(arena_ptrs, arena_strides, tl.load(rows_ptr + i_s), tiles, DIMS)


@triton.jit(do_not_specialize=["num_pinned"])
def _append_next_kernel(
    starts_ptr, lengths_ptr, capacities_ptr, cursors_ptr, slots_ptr, rows_ptr, num_pinned,
    arena_ptrs, entry_ptrs, arena_strides, entry_strides, DIMS: tl.constexpr, HAS_SLOTS: tl.constexpr,
):  # fmt: skip
    i_s = tl.program_id(0).to(tl.int64)
    tiles = _load_entry(entry_ptrs, entry_strides, i_s, DIMS)
    # scalars of this program's segment, which need no mask
    start, length = tl.load(starts_ptr + i_s), tl.load(lengths_ptr + i_s)
    grows = length < tl.load(capacities_ptr + i_s)
    if HAS_SLOTS:
        oldest = tl.load(slots_ptr + i_s)
    else:
        cursor = tl.load(cursors_ptr + i_s)
        oldest = num_pinned + cursor
    column = tl.where(grows, length, oldest)
    kept = grows | ((column >= 0) & (column < length))
    row = tl.where(kept, start + column, -1)
    tl.debug_barrier()  # a warp may be late to read the tables that another one's thread updates
    tl.store(rows_ptr + i_s, row)
    tl.store(lengths_ptr + i_s, length + 1, mask=grows)
    if not HAS_SLOTS:
        tl.store(cursors_ptr + i_s, (cursor + 1) % tl.maximum(length - num_pinned, 1), mask=~grows)
    _store_entry(arena_ptrs, arena_strides, row, tiles, DIMS)


def launch_config(arenas: Sequence[Tensor]) -> dict[str, int]:
    """Launch options: 16 bytes a thread of the widest row."""
    width = max(arena[:1].nbytes for arena in arenas)
    return {"num_warps": min(8, max(1, triton.next_power_of_2(width) // 512))}


def _arguments(arenas: Sequence[Tensor], entries: Sequence[Tensor], num_segments: int) -> dict[str, object]:
    """What both kernels take, with every arena as [R, D] and every entry as [S, D]."""
    arenas = [arena if arena.dim() == 2 else arena[:, None] for arena in arenas]
    entries = [e.reshape(num_segments, arena.shape[1]) for e, arena in zip(entries, arenas, strict=True)]
    return {
        "arena_ptrs": tuple(arenas),
        "entry_ptrs": tuple(entries),
        "arena_strides": tuple(arena.stride() for arena in arenas),
        "entry_strides": tuple(entry.stride() for entry in entries),
        "DIMS": tuple(arena.shape[1] for arena in arenas),
        **launch_config(arenas),
        **LAUNCH,
    }


def triton_append(arenas: Sequence[Tensor], rows: Tensor, entries: Sequence[Tensor]) -> None:
    """Shapes as in `append`."""
    _append_kernel[(len(rows),)](rows.contiguous(), **_arguments(arenas, entries, len(rows)))


def triton_append_next(
    arenas: Sequence[Tensor],
    entries: Sequence[Tensor],
    starts: Tensor,
    lengths: Tensor,
    capacities: Tensor,
    cursors: Tensor,
    num_pinned: int,
    slots: Tensor | None,
) -> Tensor:
    """Shapes as in `append_next`."""
    rows = torch.empty_like(starts)
    _append_next_kernel[(len(rows),)](
        starts, lengths, capacities, cursors, slots, rows, num_pinned,
        HAS_SLOTS=slots is not None, **_arguments(arenas, entries, len(rows)),
    )  # fmt: skip
    return rows
