"""Triton: one program a segment writes the segment's entry into every arena, in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from kvpolicy_kernels.backend import LAUNCH, on_its_device
from kvpolicy_kernels.tiles import next_power_of_2


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


def launch_config(arenas: Sequence[Tensor]) -> dict[str, int]:
    """Launch options: 16 bytes a thread of the widest row."""
    width = max(arena[:1].nbytes for arena in arenas)
    return {"num_warps": min(8, max(1, next_power_of_2(width) // 512))}


def _arguments(arenas: Sequence[Tensor], entries: Sequence[Tensor], num_segments: int) -> dict[str, object]:
    """What the kernel takes, with every arena as [R, D] and every entry as [S, D]."""
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


@on_its_device
def triton_append(arenas: Sequence[Tensor], rows: Tensor, entries: Sequence[Tensor]) -> None:
    """Shapes as in `append`."""
    _append_kernel[(len(rows),)](rows.contiguous(), **_arguments(arenas, entries, len(rows)))
