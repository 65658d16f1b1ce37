"""Triton: a program takes a tile of a segment's rows through all columns.

A candidate is an entry or a token, so each row is read from one of two places under two masks of which one holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from kvpolicy_kernels.backend import LAUNCH, on_its_device
from kvpolicy_kernels.tiles import cdiv, next_power_of_2

if TYPE_CHECKING:
    from kvpolicy_kernels.rebuild.op import Chosen


@triton.jit(do_not_specialize=["stride_cs", "width", "num_heads"])
def _rebuild_kernel(
    columns_ptr, starts_ptr, counts_ptr, former_ptr, stride_cs, width, num_heads,
    out_ptrs, out_strides, held_ptrs, held_strides, fresh_ptrs, fresh_strides, number_ptrs, table_ptrs, table_strides,
    DIMS: tl.constexpr, BLOCKS_D: tl.constexpr, NUMBERS: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_HELD: tl.constexpr, HAS_FRESH: tl.constexpr,
):  # fmt: skip
    i_s = tl.program_id(1).to(tl.int64)
    # scalars of this program's segment, which need no mask
    start, count, former = tl.load(starts_ptr + i_s), tl.load(counts_ptr + i_s), tl.load(former_ptr + i_s)
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < count
    # [BLOCK_N]
    column = tl.load(columns_ptr + i_s * stride_cs + o_n, mask=m_n, other=0)
    m_held, m_fresh = m_n & (column < width), m_n & (column >= width)
    for i in tl.static_range(len(DIMS)):
        o_d = tl.arange(0, BLOCKS_D[i]).to(tl.int64)
        m_d = o_d < DIMS[i]
        out = out_ptrs[i] + (start + o_n)[:, None] * out_strides[i] + o_d[None, :]
        if HAS_HELD:
            m_tile = m_held[:, None] & m_d[None, :]
            # [BLOCK_N, BLOCK_D]
            b_held = tl.load(
                held_ptrs[i] + (former + column)[:, None] * held_strides[i] + o_d[None, :], mask=m_tile, other=0
            )
            tl.store(out, b_held, mask=m_tile)
        if HAS_FRESH:
            m_tile = m_fresh[:, None] & m_d[None, :]
            i_b, i_h = i_s // num_heads, i_s % num_heads
            base = fresh_ptrs[i] + i_b * fresh_strides[i][0] + i_h * fresh_strides[i][1]
            # [BLOCK_N, BLOCK_D]
            b_fresh = tl.load(
                base + (column - width)[:, None] * fresh_strides[i][2] + o_d[None, :] * fresh_strides[i][3],
                mask=m_tile,
                other=0,
            )
            tl.store(out, b_fresh.to(out_ptrs[i].dtype.element_ty), mask=m_tile)
    for i in tl.static_range(NUMBERS):
        # [BLOCK_N]
        number = tl.load(table_ptrs[i] + i_s * table_strides[i] + column, mask=m_n, other=0)
        tl.store(number_ptrs[i] + start + o_n, number.to(number_ptrs[i].dtype.element_ty), mask=m_n)


def launch_config(dims: Sequence[int], itemsize: int) -> dict[str, object]:
    """Tile sizes and launch options: about 8 kB of the widest out a program, so that a small layer has many."""
    blocks = tuple(next_power_of_2(dim) for dim in dims)
    return {"BLOCKS_D": blocks, "BLOCK_N": min(128, max(1, 8192 // (max((1, *blocks)) * itemsize))), "num_warps": 4}


@on_its_device
def triton_rebuild(
    outs: Sequence[Tensor],
    chosen: Chosen,
    held: Sequence[Tensor] | None,
    fresh: Sequence[Tensor] | None,
    numbers: Sequence[tuple[Tensor, Tensor]],
) -> None:
    """Shapes as in `rebuild`."""
    columns, starts, counts, former, width = chosen
    count, most = columns.shape
    if not columns.numel():
        return
    config = launch_config([out.shape[1] for out in outs], max((out.itemsize for out in outs), default=1))
    own, tables = tuple(out for out, _ in numbers), tuple(table for _, table in numbers)
    _rebuild_kernel[(cdiv(most, config["BLOCK_N"]), count)](
        columns, starts, counts, former, columns.stride(0), width, count // fresh[0].shape[0] if fresh else 1,
        tuple(outs), tuple(out.stride(0) for out in outs), *_all(held, lambda entries: entries.stride(0)),
        *_all(fresh, lambda tokens: tokens.stride()), own or None, *_all(tables, lambda table: table.stride(0)),
        DIMS=tuple(out.shape[1] for out in outs), NUMBERS=len(own), HAS_HELD=bool(held), HAS_FRESH=bool(fresh),
        **config, **LAUNCH,
    )  # fmt: skip


def _all(tensors: Sequence[Tensor] | None, stride: Callable[[Tensor], object]) -> tuple[object, object]:
    """Tensors and their strides as a kernel takes them, None for none."""
    return (tuple(tensors), tuple(map(stride, tensors))) if tensors else (None, None)
