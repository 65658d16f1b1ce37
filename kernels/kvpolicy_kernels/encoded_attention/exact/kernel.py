"""Triton: attention to the chunk, or to the exact copies, while queries are turned for the codes."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpolicy_kernels.attention.kernel import launch_config
from kvpolicy_kernels.attention.tile.kernel import attend_chunk
from kvpolicy_kernels.backend import LAUNCH
from kvpolicy_kernels.base2 import LOG2E
from kvpolicy_kernels.segments import Chunk
from kvpolicy_kernels.tiles import cdiv, next_power_of_2


@triton.jit
def _exact_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, out_ptr, lse_ptr, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_km,
    stride_vb, stride_vh, stride_vm, stride_mb, stride_mn, num_kv_heads, group, n, m,
    scale_log2, softcap_log2, tanh_scale, D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, EARLY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (i_s, i_m) takes BLOCK_M of a segment's rows: row r is query r % n of the group's head r // n.

    out: float32 [S, rows, DV];  lse: float32 [S, rows], in base 2
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    i_s = tl.program_id(0)
    i_b = (i_s // num_kv_heads).to(tl.int64)
    i_h = (i_s % num_kv_heads).to(tl.int64)
    num_rows = group * n
    o_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    m_m = o_m < num_rows
    # [BLOCK_M, BLOCK_D]
    b_q = tl.load(
        q_ptr + i_b * stride_qb + (i_h * group + o_m // n)[:, None] * stride_qh + (o_m % n)[:, None] * stride_qn
        + o_d[None, :],
        mask=m_m[:, None] & (o_d < D)[None, :], other=0.0,
    )  # fmt: skip
    acc, row_max, row_sum = attend_chunk(
        tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32), tl.full([BLOCK_M], float("-inf"), dtype=tl.float32),
        tl.zeros([BLOCK_M], dtype=tl.float32), b_q, k_ptr + i_b * stride_kb + i_h * stride_kh,
        v_ptr + i_b * stride_vb + i_h * stride_vh, mask_ptr, i_b, o_m, m_m, n, m, m, stride_km, stride_vm,
        stride_mb, stride_mn, scale_log2, softcap_log2, tanh_scale, D, DV, BLOCK_N, BLOCK_DV, HAS_MASK, HAS_SOFTCAP,
        PRECISION,
    )  # fmt: skip
    # a query that has seen nothing gets zeros, and -inf
    safe_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
    rows = i_s.to(tl.int64) * num_rows + o_m
    m_out = m_m[:, None] & (o_dv < DV)[None, :]
    tl.store(out_ptr + rows[:, None] * DV + o_dv[None, :], acc / safe_sum[:, None], mask=m_out)
    tl.store(lse_ptr + rows, tl.where(row_sum == 0.0, float("-inf"), row_max + tl.log2(safe_sum)), mask=m_m)


class Exact(NamedTuple):
    """out: float32 [B * num_kv_heads, rows, Dv];  lse: float32 [B * num_kv_heads, rows], in base 2"""

    out: Tensor
    lse: Tensor


def exact_config(dtype: torch.dtype, dim: int) -> dict[str, int]:
    """Tile sizes and launch options: those of few queries over entries of this kind. dim: the larger of D and Dv"""
    config = launch_config(dtype, dim, 1, plain=False)
    return {name: config[name] for name in ("BLOCK_M", "BLOCK_N", "num_warps")}


def attend_exact(
    query: Tensor, chunk: Chunk, positions: Tensor | None, scale: float, softcap: float | None, early: bool
) -> Exact:
    """query: [B, num_q_heads, n, D], with contiguous rows

    positions: instead of the chunk's own mask: int32 [B, m], of which those below 0 are not seen
    early: the next launch may begin before this one ends
    """
    batch, num_q_heads, n, dim = query.shape
    num_kv_heads, value_dim = chunk.key.shape[1], chunk.value.shape[3]
    count, rows = batch * num_kv_heads, num_q_heads // num_kv_heads * n
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (chunk.key, chunk.value))
    mask, strides = positions, (0, 0) if positions is None else (positions.stride(0), 0)
    if positions is None and chunk.mask is not None:
        mask = chunk.mask.contiguous().view(torch.uint8)
        strides = 0 if mask.shape[0] == 1 else mask.stride(0), mask.stride(2)
    found = Exact(*(query.new_empty(count, rows, *rest, dtype=torch.float32) for rest in ((value_dim,), ())))
    config = exact_config(query.dtype, max(dim, value_dim))
    _exact_kernel[(count, cdiv(rows, config["BLOCK_M"]))](
        query, key, value, mask, *found, *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *strides,
        num_kv_heads, rows // n, n, len(chunk), scale * LOG2E, (softcap or 0.0) * LOG2E, 2.0 / (softcap or 1.0),
        D=dim, DV=value_dim, BLOCK_D=max(16, next_power_of_2(dim)), BLOCK_DV=max(16, next_power_of_2(value_dim)),
        HAS_MASK=mask is not None, HAS_SOFTCAP=softcap is not None, EARLY=early,
        # plain tf32 would lose three digits of an fp32 model
        PRECISION="tf32x3" if query.dtype == torch.float32 else "tf32", **config, **LAUNCH,
    )  # fmt: skip
    return found
