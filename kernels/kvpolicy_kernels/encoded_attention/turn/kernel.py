"""Triton: queries as attention over codes takes them: rotated, in the range of fp16, with their sums.

Once for a call: the programs that share a segment would each wait for the rotation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpolicy_kernels.backend import LAUNCH
from kvpolicy_kernels.encoded_attention.numbers.kernel import key_offset
from kvpolicy_kernels.formats import block_of, signed_hadamard
from kvpolicy_kernels.key_centre import KeyCentre
from kvpolicy_kernels.segments import ExactCopies
from kvpolicy_kernels.tiles import cdiv, next_power_of_2

NEVER = tl.constexpr(2**31 - 1)  # a position behind all others
CENTRE_SCALE = tl.constexpr(16.0)  # of biases below 30000, what is divided by it lies in the range of fp16


@triton.jit
def _turn_kernel(
    q_ptr, turn_ptr, centre_ptr, out_ptr, sums_ptr, of_centre_ptr, copies_ptr, since_ptr,
    stride_qb, stride_qh, stride_qn, num_kv_heads, group, n, slots, num_sinks, scale_log2,
    D: tl.constexpr, PLANES: tl.constexpr, TURN_SCALE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    STEP: tl.constexpr, BLOCK_C: tl.constexpr, ROTATED: tl.constexpr, COEFFICIENTS: tl.constexpr, PACKED: tl.constexpr,
    HIDES: tl.constexpr, EARLY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (i_s, i_m) takes BLOCK_M of a segment's rows: row r is query r % n of the group's head r // n.

    out:  [S, rows, D], each row divided by a power of two, so that it is within -1 and 1
    sums: float32 [S, rows, 3]: what offsets of the keys' numbers add to a product, the row's sum, and the factor that
        makes a product a score in base 2
    of_centre: float32 [S, rows, COEFFICIENTS], the coefficients of what the keys' centre adds to a score in base 2: of
        what turns, divided by CENTRE_SCALE and by what makes a product a score
    centre: float32 [COEFFICIENTS, num_kv_heads, D], `KeyCentre.coefficients`
    copies: int32 [B, slots], positions of the exact block;  since: int32 [S], its first position behind the sinks
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    i_s = tl.program_id(0).to(tl.int64)
    i_b = i_s // num_kv_heads
    i_h = i_s % num_kv_heads
    num_rows = group * n
    o_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    m_m = o_m < num_rows
    m_q = m_m[:, None] & (o_d < D)[None, :]
    q_ptrs = q_ptr + i_b * stride_qb + (i_h * group + o_m // n)[:, None] * stride_qh + (o_m % n)[:, None] * stride_qn
    if ROTATED:
        b_q = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
        for first in tl.static_range(0, BLOCK_D, STEP):
            o_k = first + tl.arange(0, STEP)
            m_k = o_k < D
            # [BLOCK_M, STEP] and [STEP, BLOCK_D]
            b_row = tl.load(q_ptrs + o_k[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)
            b_turn = tl.load(
                turn_ptr + o_k[:, None] * D + o_d[None, :], mask=m_k[:, None] & (o_d < D)[None, :], other=0
            )
            b_q = tl.dot(b_row, b_turn.to(b_row.dtype), b_q, input_precision=PRECISION)
        b_q = b_q * TURN_SCALE
    else:
        # [BLOCK_M, BLOCK_D]
        b_q = tl.load(q_ptrs + o_d[None, :], mask=m_q, other=0.0).to(tl.float32)
    # the next power of two, so that what fp16 and bf16 hold stays what it is
    top = ((tl.max(tl.abs(b_q), 1).to(tl.int32, bitcast=True) + 0x007FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    top = tl.where(top == 0.0, 1.0, top)
    b_q = (b_q / top[:, None]).to(out_ptr.dtype.element_ty)
    number = b_q.to(tl.float32)
    offset = tl.zeros([BLOCK_D], dtype=tl.float32)
    if PACKED:
        offset += key_offset(o_d // (D // PLANES), PLANES)
    rows = i_s * num_rows + o_m
    tl.store(out_ptr + rows[:, None] * D + o_d[None, :], b_q, mask=m_q)
    tl.store(sums_ptr + rows * 3, tl.sum(number * offset[None, :], 1), mask=m_m)
    tl.store(sums_ptr + rows * 3 + 1, tl.sum(number, 1), mask=m_m)
    tl.store(sums_ptr + rows * 3 + 2, top * scale_log2, mask=m_m)
    if COEFFICIENTS:
        # [BLOCK_M, BLOCK_D] and [BLOCK_D], before any rotation
        b_plain = tl.load(q_ptrs + o_d[None, :], mask=m_q, other=0.0).to(tl.float32)
        for i in tl.static_range(COEFFICIENTS):
            b_centre = tl.load(centre_ptr + (i * num_kv_heads + i_h) * D + o_d, mask=o_d < D, other=0.0)
            b_sum = tl.sum(b_plain * b_centre[None, :], 1)
            b_sum = b_sum * scale_log2 if i == 0 else b_sum / (top * CENTRE_SCALE)
            tl.store(of_centre_ptr + rows * COEFFICIENTS + i, b_sum, mask=m_m)
    if HIDES:
        o_c = num_sinks + tl.arange(0, BLOCK_C)
        # [BLOCK_C]
        b_copies = tl.load(copies_ptr + i_b * slots + o_c, mask=o_c < slots, other=-1)
        tl.store(since_ptr + i_s, tl.min(tl.where(b_copies < 0, NEVER, b_copies), 0))


class Turned(NamedTuple):
    """What `_turn_kernel` makes; None without a centre, and where nothing has an exact copy."""

    query: Tensor
    sums: Tensor
    of_centre: Tensor | None
    since: Tensor | None


def turn_config(dtype: torch.dtype, dim: int) -> dict[str, int]:
    """Tile sizes and launch options."""
    block_d = max(16, next_power_of_2(dim))
    most = 32 if dtype == torch.float32 else 128 if dim <= 128 else 64
    return {"BLOCK_M": 16, "BLOCK_D": block_d, "STEP": min(block_d, most), "num_warps": 4 if dim <= 128 else 8}


def turned(
    query: Tensor,
    num_kv_heads: int,
    planes: int,
    scale_log2: float,
    *,
    rotated: bool,
    packed: bool,
    centre: KeyCentre | None,
    copies: ExactCopies | None,
    early: bool,
) -> Turned:
    """query: [B, num_q_heads, n, D], with contiguous rows;  early: the next launch may begin before this one ends"""
    batch, num_q_heads, n, dim = query.shape
    group, single = num_q_heads // num_kv_heads, torch.float32
    count, rows = batch * num_kv_heads, group * n
    out = query.new_empty(count, rows, dim, dtype=single if query.dtype == single else torch.float16)
    sums = query.new_empty(count, rows, 3, dtype=single)
    coefficients = 0 if centre is None else len(centre.coefficients)
    of_centre = query.new_empty(count, rows, coefficients, dtype=single) if coefficients else None
    since = None if copies is None else query.new_empty(count, dtype=torch.int32)
    slots = 0 if copies is None else copies.positions.shape[1]
    config = turn_config(query.dtype, dim)
    _turn_kernel[(count, cdiv(rows, config["BLOCK_M"]))](
        query, signed_hadamard(dim, query.device) if rotated else None,
        None if centre is None else centre.coefficients, out, sums, of_centre,
        None if copies is None else copies.positions, since, *query.stride()[:3], num_kv_heads, group, n, slots,
        0 if copies is None else copies.num_sinks, scale_log2, D=dim, PLANES=planes,
        TURN_SCALE=block_of(dim) ** -0.5, BLOCK_C=next_power_of_2(max(slots, 1)), ROTATED=rotated,
        COEFFICIENTS=coefficients, PACKED=packed, HIDES=copies is not None, EARLY=early,
        PRECISION="tf32x3" if query.dtype == single else "tf32", **config, **LAUNCH,
    )  # fmt: skip
    return Turned(out, sums, of_centre, since)
