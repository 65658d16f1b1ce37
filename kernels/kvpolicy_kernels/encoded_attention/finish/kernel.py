"""Triton: what attention over codes found is rotated back, and then meets the chunk, whose rows are not encoded."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpolicy_kernels.attention.kernel import _attend_tile
from kvpolicy_kernels.backend import LAUNCH
from kvpolicy_kernels.base2 import LN2, LOG2E
from kvpolicy_kernels.formats import block_of, signed_hadamard
from kvpolicy_kernels.segments import Chunk

TO_BASE_2, TO_BASE_E = tl.constexpr(LOG2E), tl.constexpr(LN2)


@triton.jit
def _finish_kernel(
    mid_ptr, turn_ptr, q_ptr, out_ptr, lse_ptr, chunk_k_ptr, chunk_v_ptr, chunk_mask_ptr,
    stride_qb, stride_qh, stride_qn, stride_ckb, stride_ckh, stride_ckm, stride_cvb, stride_cvh, stride_cvm,
    stride_mb, stride_mn, num_kv_heads, group, n, m, scale_log2, softcap_log2, tanh_scale,
    D: tl.constexpr, DV: tl.constexpr, TURN_SCALE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_T: tl.constexpr, ROTATED: tl.constexpr,
    HAS_CHUNK: tl.constexpr, HAS_MASK: tl.constexpr, HAS_SOFTCAP: tl.constexpr, EARLY: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What was found over the entries, rotated back, and then the chunk. Program (i_s, i_m) takes rows of a segment.

    mid: float32 [B, num_q_heads, n, DV], which lse belongs to; lse becomes that of the result. BLOCK_T: channels that
    are rotated back at a time. The others are those of `attention`'s `_attend_kernel`.
    """
    i_s = tl.program_id(0)
    i_b = (i_s // num_kv_heads).to(tl.int64)
    i_h = (i_s % num_kv_heads).to(tl.int64)
    num_rows = group * n
    o_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    m_m = o_m < num_rows
    m_dv = o_dv < DV
    rows = i_s.to(tl.int64) * num_rows + o_m
    if EARLY:
        tl.extra.cuda.gdc_wait()
    if ROTATED:
        acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
        for first in tl.range(0, BLOCK_DV, BLOCK_T, num_stages=1):
            o_t = first + tl.arange(0, BLOCK_T)
            m_t = o_t < DV
            # [BLOCK_M, BLOCK_T] and [BLOCK_T, BLOCK_DV], the transpose of the rotation
            b_mid = tl.load(mid_ptr + rows[:, None] * DV + o_t[None, :], mask=m_m[:, None] & m_t[None, :], other=0.0)
            b_turn = tl.load(turn_ptr + o_dv[None, :] * DV + o_t[:, None], mask=m_t[:, None] & m_dv[None, :], other=0)
            acc = tl.dot(b_mid, b_turn.to(tl.float32), acc, input_precision="tf32x3")
        acc = acc * TURN_SCALE
    else:
        # [BLOCK_M, BLOCK_DV]
        acc = tl.load(mid_ptr + rows[:, None] * DV + o_dv[None, :], mask=m_m[:, None] & m_dv[None, :], other=0.0)
    # [BLOCK_M]
    row_max = tl.load(lse_ptr + rows, mask=m_m, other=float("-inf")) * TO_BASE_2
    row_sum = tl.where(row_max == float("-inf"), 0.0, 1.0)
    if HAS_CHUNK:
        # [BLOCK_M, BLOCK_D]
        b_q = tl.load(
            q_ptr + i_b * stride_qb + (i_h * group + o_m // n)[:, None] * stride_qh + (o_m % n)[:, None] * stride_qn
            + o_d[None, :],
            mask=m_m[:, None] & (o_d < D)[None, :],
            other=0.0,
        )  # fmt: skip
        for first in tl.range(0, m, BLOCK_N, num_stages=1):
            o_j = first + o_n
            m_n = o_j < m
            # [BLOCK_N, BLOCK_D]
            b_k = tl.load(
                chunk_k_ptr + i_b * stride_ckb + i_h * stride_ckh + o_j[:, None].to(tl.int64) * stride_ckm
                + o_d[None, :],
                mask=m_n[:, None] & (o_d < D)[None, :],
                other=0.0,
            )  # fmt: skip
            # [BLOCK_N, BLOCK_DV]
            b_v = tl.load(
                chunk_v_ptr + i_b * stride_cvb + i_h * stride_cvh + o_j[:, None].to(tl.int64) * stride_cvm
                + o_dv[None, :],
                mask=m_n[:, None] & m_dv[None, :],
                other=0.0,
            )  # fmt: skip
            visible = m_m[:, None] & m_n[None, :]
            if HAS_MASK:
                # [BLOCK_M, BLOCK_N]
                b_seen = tl.load(
                    chunk_mask_ptr + i_b * stride_mb + (o_m % n)[:, None] * stride_mn + o_j[None, :],
                    mask=visible,
                    other=0,
                )
                visible = visible & (b_seen != 0)
            else:
                visible = visible & (o_j[None, :] <= (o_m % n)[:, None] + m - n)
            acc, row_max, row_sum = _attend_tile(
                acc, row_max, row_sum, b_q, b_k, b_v, visible, scale_log2, softcap_log2, tanh_scale,
                q_ptr, m_m, True, HAS_SOFTCAP, False, PRECISION,
            )  # fmt: skip
    safe_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
    b_out = acc / safe_sum[:, None]
    tl.store(
        out_ptr + rows[:, None] * DV + o_dv[None, :], b_out.to(out_ptr.dtype.element_ty),
        mask=m_m[:, None] & m_dv[None, :],
    )  # fmt: skip
    b_lse = tl.where(row_sum == 0.0, float("-inf"), row_max + tl.log2(safe_sum))
    tl.store(lse_ptr + rows, b_lse * TO_BASE_E, mask=m_m)


def finish_config(dim: int) -> dict[str, int]:
    """Tile sizes and launch options. dim: the larger of D and Dv"""
    return {"BLOCK_M": 16, "BLOCK_N": 32 if dim <= 128 else 16, "BLOCK_T": 64 if dim <= 128 else 32, "num_warps": 4}


def finish(
    mid: Tensor,
    lse: Tensor,
    out: Tensor,
    query: Tensor,
    chunk: Chunk | None,
    num_kv_heads: int,
    scale: float,
    softcap: float | None,
    rotated: bool,
    early: bool,
) -> None:
    """Writes `out`, and what `lse` is with the chunk.

    mid: float32 [B, num_q_heads, n, Dv], contiguous, over the entries alone, rotated or not
    lse: float32 [B, num_q_heads, n], of `mid`;  query: [B, num_q_heads, n, D], with contiguous rows
    early: the launch before lets this one begin before it ends
    """
    batch, num_q_heads, n, dim = query.shape
    value_dim, group = mid.shape[3], num_q_heads // num_kv_heads
    key, value, mask = (None,) * 3 if chunk is None else (chunk.key, chunk.value, chunk.mask)
    key, value = (x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    mask = None if mask is None else mask.contiguous().view(torch.uint8)
    config = finish_config(max(dim, value_dim))
    _finish_kernel[(batch * num_kv_heads, triton.cdiv(group * n, config["BLOCK_M"]))](
        mid, signed_hadamard(value_dim, query.device) if rotated else None, query, out, lse, key, value, mask,
        *query.stride()[:3], *_strides(key), *_strides(value),
        0 if mask is None or mask.shape[0] == 1 else mask.stride(0), 0 if mask is None else mask.stride(2),
        num_kv_heads, group, n, 0 if chunk is None else len(chunk),
        scale * LOG2E, (softcap or 0.0) * LOG2E, 2.0 / (softcap or 1.0),
        D=dim, DV=value_dim, TURN_SCALE=block_of(value_dim) ** -0.5,
        BLOCK_D=max(16, triton.next_power_of_2(dim)), BLOCK_DV=max(16, triton.next_power_of_2(value_dim)),
        ROTATED=rotated, HAS_CHUNK=chunk is not None, HAS_MASK=mask is not None, HAS_SOFTCAP=softcap is not None,
        EARLY=early, PRECISION="tf32x3" if query.dtype == torch.float32 else "tf32", **config, **LAUNCH,
        **({"launch_pdl": True} if early else {}),
    )  # fmt: skip


def _strides(chunk: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if chunk is None else chunk.stride()[:3]
