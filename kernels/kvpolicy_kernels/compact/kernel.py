"""Triton: a gather-scatter of rows, and the same within the segments of an arena.

Rows move in tiles of a few rows by all columns, so that threads load 16 bytes each. In place, one program moves a
slice of the columns of one segment from the front to the back, tile after tile. An entry never lies before its new
place. So the rows that a tile overwrites hold its own entries or ones that moved before: it is enough that every
thread has read its part of a tile before one stores.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from kvpolicy_kernels.backend import LAUNCH, on_its_device
from kvpolicy_kernels.tiles import cdiv, next_power_of_2


@triton.jit(do_not_specialize=["num_rows", "length"])
def _compact_kernel(
    out_ptr, out_rows_ptr, source_ptr, source_rows_ptr,
    stride_on, stride_od, stride_sb, stride_sh, stride_sn, stride_sd, num_rows, length,
    NUM_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    IS_CHUNK: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D).to(tl.int64)
    m_n = o_n < num_rows
    mask = m_n[:, None] & (o_d < D)[None, :]
    # [BLOCK_N]
    row = tl.load(source_rows_ptr + o_n, mask=m_n, other=0)
    if IS_CHUNK:
        flat = row.to(INDEX)
        segment = flat // length
        i_b, i_h, i_n = segment // NUM_HEADS, segment % NUM_HEADS, flat - segment * length
        place = i_b.to(tl.int64) * stride_sb + i_h.to(tl.int64) * stride_sh + i_n.to(tl.int64) * stride_sn
    else:
        place = row * stride_sn
    # [BLOCK_N, BLOCK_D]
    tile = tl.load(source_ptr + place[:, None] + o_d[None, :] * stride_sd, mask=mask)
    # [BLOCK_N]
    out_row = tl.load(out_rows_ptr + o_n, mask=m_n, other=0)
    tl.store(
        out_ptr + out_row[:, None] * stride_on + o_d[None, :] * stride_od, tile.to(out_ptr.dtype.element_ty), mask=mask
    )


@triton.jit
def _load_tile(base, columns_ptr, stride_cn, strides, first, count, o_d, m_d, BLOCK_N: tl.constexpr):
    o_n = (first + tl.arange(0, BLOCK_N)).to(tl.int64)
    m_n = o_n < count
    # [BLOCK_N]
    column = tl.load(columns_ptr + o_n * stride_cn, mask=m_n, other=0)
    # [BLOCK_N, BLOCK_D]
    return tl.load(base + column[:, None] * strides[0] + o_d[None, :] * strides[1], mask=m_n[:, None] & m_d[None, :])


@triton.jit
def _move_forward(
    base, columns_ptr, stride_cn, strides, count, first_d,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    o_d = first_d.to(tl.int64) + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    ahead = _load_tile(base, columns_ptr, stride_cn, strides, 0, count, o_d, m_d, BLOCK_N)
    for first in range(0, count, BLOCK_N):
        tile = ahead
        # no tile up to this one is stored where the next one reads: its entries lie behind all of their places
        ahead = _load_tile(base, columns_ptr, stride_cn, strides, first + BLOCK_N, count, o_d, m_d, BLOCK_N)
        tl.debug_barrier()  # every thread has read its part of the tile
        o_n = (first + tl.arange(0, BLOCK_N)).to(tl.int64)
        tl.store(
            base + o_n[:, None] * strides[0] + o_d[None, :] * strides[1],
            tile,
            mask=(o_n < count)[:, None] & m_d[None, :],
        )


@triton.jit
def _compact_in_place_kernel(
    starts_ptr, columns_ptr, counts_ptr, stride_cs, stride_cn, arena_ptrs, arena_strides,
    DIMS: tl.constexpr, BLOCKS_D: tl.constexpr, BLOCK_N: tl.constexpr, NUM_SLICES: tl.constexpr,
):  # fmt: skip
    i_s = (tl.program_id(0) // NUM_SLICES).to(tl.int64)
    i_slice = tl.program_id(0) % NUM_SLICES
    # scalars of this program's segment, which need no mask
    start, count = tl.load(starts_ptr + i_s), tl.load(counts_ptr + i_s)
    for i in tl.static_range(len(DIMS)):
        # the slices of an arena follow those of the arenas before it
        if (i_slice >= 0) & (i_slice * BLOCKS_D[i] < DIMS[i]):
            _move_forward(
                arena_ptrs[i] + start * arena_strides[i][0], columns_ptr + i_s * stride_cs, stride_cn,
                arena_strides[i], count, i_slice * BLOCKS_D[i], DIMS[i], BLOCK_N, BLOCKS_D[i],
            )  # fmt: skip
        i_slice -= (DIMS[i] + BLOCKS_D[i] - 1) // BLOCKS_D[i]


def launch_config(dim: int, itemsize: int) -> dict[str, int]:
    """Tile sizes and launch options of `compact`: 16 kB a program, which are eight loads of 16 bytes a thread."""
    block = next_power_of_2(dim)
    return {"BLOCK_N": min(512, max(1, 16384 // (block * itemsize))), "BLOCK_D": block, "num_warps": 4}


def in_place_config(dims: Sequence[int], itemsizes: Sequence[int]) -> dict[str, object]:
    """Tile sizes and launch options of `compact_in_place`.

    A slice is 32 bytes, the least that memory is read by: a layer of few heads then still has a program an SM. One
    stage: the loop loads ahead itself, as far as the order of loads and stores allows.
    """
    blocks = tuple(min(next_power_of_2(d), max(1, 32 // size)) for d, size in zip(dims, itemsizes, strict=True))
    slices = sum(cdiv(dim, block) for dim, block in zip(dims, blocks, strict=True))
    return {"BLOCKS_D": blocks, "BLOCK_N": 1024, "NUM_SLICES": slices, "num_warps": 8, "num_stages": 1}


@on_its_device
def triton_compact(out: Tensor, out_rows: Tensor, source: Tensor, source_rows: Tensor) -> None:
    """Shapes as in `compact`."""
    is_chunk = source.dim() != out.dim()
    if out.dim() == 1:
        out, source = out[:, None], source[..., None]
    num_heads, length = source.shape[1:3] if is_chunk else (1, 1)
    strides = source.stride() if is_chunk else (0, 0, *source.stride())
    config = launch_config(out.shape[1], max(out.itemsize, source.itemsize))
    _compact_kernel[(cdiv(len(out_rows), config["BLOCK_N"]),)](
        out, out_rows.contiguous(), source, source_rows.contiguous(), *out.stride(), *strides, len(out_rows), length,
        NUM_HEADS=num_heads, D=out.shape[1], IS_CHUNK=is_chunk,
        # a division of 64 bits takes several times as long
        INDEX=tl.int32 if source.shape[:-1].numel() < 2**31 else tl.int64, **config, **LAUNCH,
    )  # fmt: skip


@on_its_device
def triton_compact_in_place(arenas: Sequence[Tensor], starts: Tensor, columns: Tensor, counts: Tensor) -> None:
    """Shapes as in `compact_in_place`."""
    arenas = tuple(arena if arena.dim() == 2 else arena[:, None] for arena in arenas)
    dims = tuple(arena.shape[1] for arena in arenas)
    config = in_place_config(dims, [arena.itemsize for arena in arenas])
    _compact_in_place_kernel[(len(starts) * config["NUM_SLICES"],)](
        starts.contiguous(), columns, counts.contiguous(), *columns.stride(),
        arenas, tuple(arena.stride() for arena in arenas), DIMS=dims, **config, **LAUNCH,
    )  # fmt: skip
