"""Triton: queries as attention over codes takes them: rotated, in the range of fp16, with their sums.

Once for a call: the programs that share a segment would each wait for the rotation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpolicy_kernels.backend import LAUNCH, interpreted
from kvpolicy_kernels.encoded_attention.numbers.kernel import key_offset
from kvpolicy_kernels.encoded_attention.rotation.kernel import mixed
from kvpolicy_kernels.formats import block_of, hadamard_signs
from kvpolicy_kernels.key_centre import KeyCentre
from kvpolicy_kernels.segments import ExactCopies
from kvpolicy_kernels.tiles import cdiv, next_power_of_2

NEVER = tl.constexpr(2**31 - 1)  # a position behind all others
CENTRE_SCALE = tl.constexpr(16.0)  # of biases below 30000, what is divided by it lies in the range of fp16


@triton.jit
def _turn_kernel(
    q_ptr, signs_ptr, centre_ptr, out_ptr, sums_ptr, of_centre_ptr, copies_ptr, since_ptr,
    stride_qb, stride_qh, stride_qn, num_kv_heads, group, n, slots, num_sinks, scale_log2,
    D: tl.constexpr, PLANES: tl.constexpr, TURN_BLOCK: tl.constexpr, TURN_SCALE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, ROTATED: tl.constexpr, COEFFICIENTS: tl.constexpr,
    PACKED: tl.constexpr, HIDES: tl.constexpr, EARLY: tl.constexpr, BEHIND: tl.constexpr,
):  # fmt: skip
    """Program (i_s, i_m) takes BLOCK_M of a segment's rows: row r is query r % n of the group's head r // n.

    out:  [S, rows, D], each row divided by a power of two, so that it is within -1 and 1
    sums: float32 [S, rows, 3]: what offsets of the keys' numbers add to a product, the row's sum, and the factor that
        makes a product a score in base 2
    of_centre: float32 [S, rows, COEFFICIENTS], the coefficients of what the keys' centre adds to a score in base 2: of
        what turns, divided by CENTRE_SCALE and by what makes a product a score
    signs: int8 [D], `hadamard_signs`;  centre: float32 [COEFFICIENTS, num_kv_heads, D], `KeyCentre.coefficients`
    copies: int32 [B, slots], positions of the exact block;  since: int32 [S], its first position behind the sinks
    BEHIND: a launch that may still run, which is not over before this one
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
    m_d = o_d < D
    # [BLOCK_M, BLOCK_D], before any rotation
    b_plain = tl.load(
        q_ptr + i_b * stride_qb + (i_h * group + o_m // n)[:, None] * stride_qh + (o_m % n)[:, None] * stride_qn
        + o_d[None, :],
        mask=m_m[:, None] & m_d[None, :], other=0.0,
    ).to(tl.float32)  # fmt: skip
    b_q = b_plain
    if ROTATED:
        b_sign = tl.load(signs_ptr + o_d, mask=m_d, other=0).to(tl.float32)
        # blocks lie in one row behind the other
        b_q = mixed(tl.reshape(b_plain * b_sign[None, :], [BLOCK_M * BLOCK_D]), TURN_BLOCK) * TURN_SCALE
        b_q = tl.reshape(b_q, [BLOCK_M, BLOCK_D])
    # the next power of two, so that what fp16 and bf16 hold stays what it is
    top = ((tl.max(tl.abs(b_q), 1).to(tl.int32, bitcast=True) + 0x007FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    top = tl.where(top == 0.0, 1.0, top)
    b_q = (b_q / top[:, None]).to(out_ptr.dtype.element_ty)
    number = b_q.to(tl.float32)
    rows = i_s * num_rows + o_m
    tl.store(out_ptr + rows[:, None] * D + o_d[None, :], b_q, mask=m_m[:, None] & m_d[None, :])
    offset = tl.zeros([BLOCK_M], dtype=tl.float32)
    if PACKED:
        offset = tl.sum(number * key_offset(o_d // (D // PLANES), PLANES)[None, :], 1)
    tl.store(sums_ptr + rows * 3, offset, mask=m_m)
    tl.store(sums_ptr + rows * 3 + 1, tl.sum(number, 1), mask=m_m)
    tl.store(sums_ptr + rows * 3 + 2, top * scale_log2, mask=m_m)
    if COEFFICIENTS:
        for i in tl.static_range(COEFFICIENTS):
            b_centre = tl.load(centre_ptr + (i * num_kv_heads + i_h) * D + o_d, mask=m_d, other=0.0)
            of_centre = tl.sum(b_plain * b_centre[None, :], 1)
            of_centre = of_centre * scale_log2 if i == 0 else of_centre / (top * CENTRE_SCALE)
            tl.store(of_centre_ptr + rows * COEFFICIENTS + i, of_centre, mask=m_m)
    if HIDES:
        o_c = num_sinks + tl.arange(0, BLOCK_C)
        # [BLOCK_C]
        b_copies = tl.load(copies_ptr + i_b * slots + o_c, mask=o_c < slots, other=-1)
        tl.store(since_ptr + i_s, tl.min(tl.where(b_copies < 0, NEVER, b_copies), 0))  # every program's the same
    if BEHIND:
        tl.extra.cuda.gdc_wait()


class Turned(NamedTuple):
    """What `_turn_kernel` makes; None without a centre, and where nothing has an exact copy."""

    query: Tensor
    sums: Tensor
    of_centre: Tensor | None
    since: Tensor | None


def turn_config(dim: int, rows: int) -> dict[str, int]:
    """Tile sizes and launch options: one row a program, which up to head dim 128 does not leave its warp.

    The interpreter takes milliseconds for a program, however many rows it has.
    """
    block_m = 16 if interpreted() and rows > 16 else 1
    return {"BLOCK_M": block_m, "BLOCK_D": max(16, next_power_of_2(dim)), "num_warps": 1 if dim <= 128 else 2}


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
    early: bool = False,
    behind: bool = False,
) -> Turned:
    """query: [B, num_q_heads, n, D], with contiguous rows

    early: the next launch may begin before this one ends;  behind: so may this one, behind the launch before
    """
    batch, num_q_heads, n, dim = query.shape
    group, single = num_q_heads // num_kv_heads, torch.float32
    count, rows = batch * num_kv_heads, group * n
    out = query.new_empty(count, rows, dim, dtype=single if query.dtype == single else torch.float16)
    sums = query.new_empty(count, rows, 3, dtype=single)
    coefficients = 0 if centre is None else len(centre.coefficients)
    of_centre = query.new_empty(count, rows, coefficients, dtype=single) if coefficients else None
    since = None if copies is None else query.new_empty(count, dtype=torch.int32)
    slots = 0 if copies is None else copies.positions.shape[1]
    config = turn_config(dim, rows)
    _turn_kernel[(count, cdiv(rows, config["BLOCK_M"]))](
        query, hadamard_signs(dim, query.device) if rotated else None,
        None if centre is None else centre.coefficients, out, sums, of_centre,
        None if copies is None else copies.positions, since, *query.stride()[:3], num_kv_heads, group, n, slots,
        0 if copies is None else copies.num_sinks, scale_log2, D=dim, PLANES=planes,
        TURN_BLOCK=block_of(dim), TURN_SCALE=block_of(dim) ** -0.5, BLOCK_C=next_power_of_2(max(slots, 1)),
        ROTATED=rotated, COEFFICIENTS=coefficients, PACKED=packed, HIDES=copies is not None,
        EARLY=early, BEHIND=behind, **config, **LAUNCH, **({"launch_pdl": True} if behind else {}),
    )  # fmt: skip
    return Turned(out, sums, of_centre, since)
