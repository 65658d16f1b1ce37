"""Triton: what a tile of entries that are not encoded adds for few queries. Kernels call these; none is one itself."""

from __future__ import annotations

import triton
import triton.language as tl

from kvpolicy_kernels.softcap.kernel import capped


@triton.jit
def attend_tile(
    acc, row_max, row_sum, b_q, b_k, b_v, visible, scale_log2, softcap_log2, tanh_scale, logits_ptrs, m_logits,
    MASKED: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_LOGITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # [BLOCK_M, BLOCK_N]
    scores = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale_log2
    if HAS_SOFTCAP:
        scores = capped(scores, softcap_log2, tanh_scale, b_q.dtype == tl.float32)
    if HAS_LOGITS:
        tl.store(logits_ptrs, scores, mask=m_logits)
    if MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    # a row that has seen nothing yet keeps -inf; subtracting it would give NaN
    safe_max = tl.where(new_max == float("-inf"), 0.0, new_max) if MASKED else new_max
    shrink = tl.exp2(row_max - safe_max)
    p = tl.exp2(scores - safe_max[:, None])
    acc = acc * shrink[:, None] + tl.dot(p.to(b_v.dtype), b_v, input_precision=PRECISION)
    return acc, new_max, row_sum * shrink + tl.sum(p, 1)


@triton.jit
def attend_chunk(
    acc, row_max, row_sum, b_q, k_ptr, v_ptr, mask_ptr, i_b, o_m, m_m, n, end, m,
    stride_km, stride_vm, stride_mb, stride_mn, scale_log2, softcap_log2, tanh_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DV: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A head's chunk, of which nothing is seen where `end` is 0. b_q: [BLOCK_M, BLOCK_D], row r being query r % n

    k: [m, D], rows stride_km elements apart;  v: [m, DV], stride_vm apart;  end: m, or 0
    mask: uint8 [B or 1, 1, n, m], or int32 [B, m]: positions, of which those below 0 are not seen
    """
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, b_q.shape[1])
    o_dv = tl.arange(0, BLOCK_DV)
    for first in tl.range(0, end, BLOCK_N, num_stages=1):
        o_j = first + o_n
        m_n = o_j < m
        # [BLOCK_N, BLOCK_D] and [BLOCK_N, BLOCK_DV]
        b_k = tl.load(
            k_ptr + o_j[:, None].to(tl.int64) * stride_km + o_d[None, :],
            mask=m_n[:, None] & (o_d < D)[None, :], other=0.0,
        )  # fmt: skip
        b_v = tl.load(
            v_ptr + o_j[:, None].to(tl.int64) * stride_vm + o_dv[None, :],
            mask=m_n[:, None] & (o_dv < DV)[None, :], other=0.0,
        )  # fmt: skip
        visible = m_m[:, None] & m_n[None, :]
        if HAS_MASK and mask_ptr.dtype.element_ty == tl.int32:
            # [BLOCK_N]
            b_position = tl.load(mask_ptr + i_b * stride_mb + o_j, mask=m_n, other=-1)
            visible = visible & (b_position >= 0)[None, :]
        elif HAS_MASK:
            # [BLOCK_M, BLOCK_N]
            b_seen = tl.load(
                mask_ptr + i_b * stride_mb + (o_m % n)[:, None] * stride_mn + o_j[None, :], mask=visible, other=0
            )
            visible = visible & (b_seen != 0)
        else:
            visible = visible & (o_j[None, :] <= (o_m % n)[:, None] + m - n)
        acc, row_max, row_sum = attend_tile(
            acc, row_max, row_sum, b_q, b_k, b_v, visible, scale_log2, softcap_log2, tanh_scale,
            o_j, m_n, True, HAS_SOFTCAP, False, PRECISION,
        )  # fmt: skip
    return acc, row_max, row_sum
