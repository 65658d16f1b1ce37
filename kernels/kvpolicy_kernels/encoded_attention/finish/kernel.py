"""Triton: the pieces of a row are merged, rotated back, and meet the chunk, whose rows are not encoded."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpolicy_kernels.backend import LAUNCH
from kvpolicy_kernels.base2 import LN2, LOG2E
from kvpolicy_kernels.formats import block_of, signed_hadamard
from kvpolicy_kernels.segments import Chunk
from kvpolicy_kernels.softcap.kernel import capped
from kvpolicy_kernels.tiles import cdiv, next_power_of_2

TO_BASE_2, TO_BASE_E = tl.constexpr(LOG2E), tl.constexpr(LN2)
FEW = 1024  # rows, up to which each has a program of its own


@triton.jit
def _signs(SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """float32 [SIZE, SIZE], Hadamard matrices of size BLOCK along the diagonal. BLOCK: at most 16"""
    o_i = tl.arange(0, SIZE)
    shared = (o_i[:, None] & o_i[None, :]) & (BLOCK - 1)
    odd = shared ^ (shared >> 2)
    odd = (odd ^ (odd >> 1)) & 1
    return tl.where(o_i[:, None] // BLOCK == o_i[None, :] // BLOCK, 1.0 - 2.0 * odd.to(tl.float32), 0.0)


@triton.jit
def _mixed(x, BLOCK: tl.constexpr):
    """A row times Hadamard matrices of size BLOCK along the diagonal: first 16 neighbours, then what is 16 apart."""
    PARTS: tl.constexpr = x.shape[0] // 16
    x = tl.reshape(x, [PARTS, 16])
    x = tl.sum(x[:, :, None] * _signs(16, 16)[None, :, :], 1)
    if BLOCK > 16:
        x = tl.sum(x[:, None, :] * _signs(PARTS, BLOCK // 16)[:, :, None], 0)
    return tl.reshape(x, [PARTS * 16])


@triton.jit
def _merged(
    mid_ptr,
    lse_ptr,
    part_ptr,
    part_lse_ptr,
    first,
    count,
    row,
    i_r,
    num_rows,
    o_dv,
    m_dv,
    DV: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """What was found of a row, and its log-sum-exp in base 2, -inf if there was nothing."""
    acc = tl.zeros([BLOCK_P, o_dv.shape[0]], dtype=tl.float32)
    total = tl.zeros([BLOCK_P], dtype=tl.float32)
    peak = tl.full([BLOCK_P], float("-inf"), dtype=tl.float32)
    for i_p in range(0, tl.where(count > 1, count, 0), BLOCK_P):
        o_p = i_p + tl.arange(0, BLOCK_P)
        m_p = o_p < count
        rows = (first + o_p).to(tl.int64) * num_rows + i_r
        # [BLOCK_P] and [BLOCK_P, BLOCK_DV]
        b_lse = tl.load(part_lse_ptr + rows, mask=m_p, other=float("-inf"))
        b_part = tl.load(part_ptr + rows[:, None] * DV + o_dv[None, :], mask=m_p[:, None] & m_dv[None, :], other=0.0)
        new_peak = tl.maximum(peak, b_lse)
        safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        shrink, weight = tl.exp2(peak - safe), tl.exp2(b_lse - safe)
        acc = acc * shrink[:, None] + b_part * weight[:, None]
        total = total * shrink + weight
        peak = new_peak
    top = tl.max(peak, 0)
    safe = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp2(peak - safe)
    norm = tl.sum(total * weight, 0)
    safe_norm = tl.where(norm == 0.0, 1.0, norm)
    found = tl.sum(acc * weight[:, None], 0) / safe_norm
    lse = tl.where(norm == 0.0, float("-inf"), safe + tl.log2(safe_norm))
    if count == 1:  # nothing to merge
        found = tl.load(mid_ptr + row * DV + o_dv, mask=m_dv, other=0.0)
        lse = tl.load(lse_ptr + row) * TO_BASE_2
    return found, lse


@triton.jit
def _finish_kernel(
    mid_ptr, part_ptr, part_lse_ptr, pieces_ptr, turn_ptr, q_ptr, out_ptr, lse_ptr, chunk_k_ptr, chunk_v_ptr,
    chunk_mask_ptr, stride_qb, stride_qh, stride_qn, stride_ckb, stride_ckh, stride_ckm, stride_cvb, stride_cvh,
    stride_cvm, stride_mb, stride_mn, num_kv_heads, group, n, m, rows_each, scale_log2, softcap_log2, tanh_scale,
    D: tl.constexpr, DV: tl.constexpr, TURN_BLOCK: tl.constexpr, TURN_SCALE: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ROTATED: tl.constexpr,
    HAS_CHUNK: tl.constexpr, HAS_MASK: tl.constexpr, HAS_SOFTCAP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Program (i_s, i_m) takes `rows_each` rows of a segment: row r is query r % n of the group's head r // n.

    The chunk comes first: it needs nothing of what is still being computed.

    mid: float32 [B, num_q_heads, n, DV], what was found over the entries of segments in one piece, and lse belongs to
        it; lse becomes that of the result.  part, part_lse, pieces: of the others, see `attention`'s `_attend_kernel`
    turn: int8 [DV, DV], `signed_hadamard`: the signs stand in the first column of each block
    chunk_mask: uint8 [B or 1, 1, n, m], or int32 [B, m]: positions, of which those below 0 are not seen
    """
    i_s = tl.program_id(0)
    i_b = (i_s // num_kv_heads).to(tl.int64)
    i_h = (i_s % num_kv_heads).to(tl.int64)
    num_rows = group * n
    first, count = tl.load(pieces_ptr + i_s * 2), tl.load(pieces_ptr + i_s * 2 + 1)
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    m_dv = o_dv < DV
    b_sign = 1.0
    if ROTATED:
        # [BLOCK_DV]
        b_sign = tl.load(turn_ptr + o_dv * DV + o_dv // TURN_BLOCK * TURN_BLOCK, mask=m_dv, other=0) * TURN_SCALE
    last = tl.minimum((tl.program_id(1) + 1) * rows_each, num_rows)
    for i_r in range(tl.program_id(1) * rows_each, last):
        acc = tl.zeros([BLOCK_DV], dtype=tl.float32)
        total = 0.0
        peak = float("-inf")
        if HAS_CHUNK:
            # [BLOCK_D]
            b_q = tl.load(
                q_ptr + i_b * stride_qb + (i_h * group + i_r // n) * stride_qh + (i_r % n) * stride_qn + o_d,
                mask=o_d < D, other=0.0,
            ).to(tl.float32)  # fmt: skip
            for begin in range(0, m, BLOCK_N):
                o_j = begin + o_n
                m_n = o_j < m
                # [BLOCK_N, BLOCK_D]
                b_k = tl.load(
                    chunk_k_ptr + i_b * stride_ckb + i_h * stride_ckh + o_j[:, None].to(tl.int64) * stride_ckm
                    + o_d[None, :],
                    mask=m_n[:, None] & (o_d < D)[None, :], other=0.0,
                )  # fmt: skip
                # [BLOCK_N, BLOCK_DV]
                b_v = tl.load(
                    chunk_v_ptr + i_b * stride_cvb + i_h * stride_cvh + o_j[:, None].to(tl.int64) * stride_cvm
                    + o_dv[None, :],
                    mask=m_n[:, None] & m_dv[None, :], other=0.0,
                )  # fmt: skip
                visible = m_n
                if HAS_MASK:
                    # [BLOCK_N]
                    b_seen = tl.load(
                        chunk_mask_ptr + i_b * stride_mb + (i_r % n) * stride_mn + o_j, mask=m_n, other=0
                    )  # fmt: skip
                    visible = m_n & ((b_seen >= 0) if chunk_mask_ptr.dtype.element_ty == tl.int32 else (b_seen != 0))
                else:
                    visible = m_n & (o_j <= i_r % n + m - n)
                scores = tl.sum(b_k.to(tl.float32) * b_q[None, :], 1) * scale_log2
                if HAS_SOFTCAP:
                    scores = capped(scores, softcap_log2, tanh_scale, q_ptr.dtype.element_ty == tl.float32)
                scores = tl.where(visible, scores, float("-inf"))
                new_peak = tl.maximum(peak, tl.max(scores, 0))
                safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
                shrink, p = tl.exp2(peak - safe), tl.exp2(scores - safe)
                acc = acc * shrink + tl.sum(p[:, None] * b_v.to(tl.float32), 0)
                total = total * shrink + tl.sum(p, 0)
                peak = new_peak
        if EARLY:
            tl.extra.cuda.gdc_wait()
        row = i_s.to(tl.int64) * num_rows + i_r
        found, lse = _merged(
            mid_ptr, lse_ptr, part_ptr, part_lse_ptr, first, count, row, i_r, num_rows, o_dv, m_dv, DV, BLOCK_P
        )
        if ROTATED:
            found = _mixed(found, TURN_BLOCK) * b_sign
        top = tl.maximum(peak, lse)
        safe = tl.where(top == float("-inf"), 0.0, top)
        of_entries, of_chunk = tl.exp2(lse - safe), tl.exp2(peak - safe)
        norm = of_entries + total * of_chunk
        safe_norm = tl.where(norm == 0.0, 1.0, norm)
        b_out = (found * of_entries + acc * of_chunk) / safe_norm
        tl.store(out_ptr + row * DV + o_dv, b_out.to(out_ptr.dtype.element_ty), mask=m_dv)
        b_lse = tl.where(norm == 0.0, float("-inf"), safe + tl.log2(safe_norm))
        tl.debug_barrier()  # every thread has read the row's
        tl.store(lse_ptr + row, b_lse * TO_BASE_E)


def finish_config(dim: int) -> dict[str, int]:
    """Tile sizes and launch options. dim: the larger of D and Dv"""
    return {"BLOCK_N": 64 if dim <= 128 else 32, "BLOCK_P": 32 if dim <= 128 else 16, "num_warps": 4}


def finish(
    mid: Tensor,
    lse: Tensor,
    parts: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    query: Tensor,
    chunk: Chunk | None,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    rotated: bool,
    early: bool,
) -> None:
    """Writes `out`, and what `lse` is with the chunk.

    mid: float32 [B, num_q_heads, n, Dv], contiguous, over the entries alone, rotated or not, of segments in one piece
    lse: float32 [B, num_q_heads, n], of `mid`;  query: [B, num_q_heads, n, D], with contiguous rows
    parts: float32 [P, rows, Dv], their log-sum-exps [P, rows] in base 2, and int32 [S, 2], as for `merge_pieces`
    mask: instead of the chunk's own: int32 [B, m], positions, of which those below 0 are not seen
    early: the launch before lets this one begin before it ends
    """
    part, part_lse, pieces = parts
    batch, num_q_heads, n, dim = query.shape
    value_dim, num_segments = mid.shape[3], len(pieces)
    num_kv_heads = num_segments // batch
    rows = num_q_heads // num_kv_heads * n
    key, value = (None, None) if chunk is None else (chunk.key, chunk.value)
    key, value = (x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    strides = (0, 0) if mask is None else (mask.stride(0), 0)
    if mask is None and chunk is not None and chunk.mask is not None:
        mask = chunk.mask.contiguous().view(torch.uint8)
        strides = (0 if mask.shape[0] == 1 else mask.stride(0)), mask.stride(2)
    rows_each = 1 if num_segments * rows <= FEW else rows  # then the chunk is read once for all of them
    _finish_kernel[(num_segments, cdiv(rows, rows_each))](
        mid, part, part_lse, pieces, signed_hadamard(value_dim, query.device) if rotated else None, query, out, lse,
        key, value, mask, *query.stride()[:3], *_strides(key), *_strides(value), *strides,
        num_kv_heads, rows // n, n, 0 if chunk is None else len(chunk), rows_each,
        scale * LOG2E, (softcap or 0.0) * LOG2E, 2.0 / (softcap or 1.0),
        D=dim, DV=value_dim, TURN_BLOCK=block_of(value_dim), TURN_SCALE=block_of(value_dim) ** -0.5,
        BLOCK_D=max(16, next_power_of_2(dim)), BLOCK_DV=max(16, next_power_of_2(value_dim)),
        ROTATED=rotated, HAS_CHUNK=chunk is not None, HAS_MASK=mask is not None, HAS_SOFTCAP=softcap is not None,
        EARLY=early, **finish_config(max(dim, value_dim)), **LAUNCH, **({"launch_pdl": True} if early else {}),
    )  # fmt: skip


def _strides(chunk: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if chunk is None else chunk.stride()[:3]
