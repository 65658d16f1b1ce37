"""Triton: flash attention whose key loop starts at the window, after the sinks.

One program owns BLOCK_M queries of one query head and walks at most two runs of key tiles: the tiles that hold the
sinks, and the tiles from the oldest key that its first query sees up to its last query. Every tile is masked with
the rule itself, so tile edges need no care.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpolicy_kernels.backend import LAUNCH, at_least_hopper, on_its_device
from kvpolicy_kernels.base2 import LOG2E
from kvpolicy_kernels.softcap.kernel import capped
from kvpolicy_kernels.tiles import cdiv, next_power_of_2

TO_BASE_2 = tl.constexpr(LOG2E)

COUNTS = ("before", "length", "prefill", "skipped")  # change from call to call and must not compile again


@triton.jit
def _oldest(o_q, capacity, num_sinks, tokens_per_block):
    """The oldest token besides the sinks that token o_q sees, where capacities grow."""
    number = o_q // tokens_per_block
    evicted = tl.maximum(o_q - number * tokens_per_block + 1 - capacity, 0)  # in its own block
    return num_sinks + number * (tokens_per_block - capacity) + evicted


@triton.jit
def _attend_tile(
    acc, row_max, row_sum, b_q, k_base, v_base, o_n, o_m, o_oldest, o_d, o_dv, stride_kn, stride_vn,
    length, window, num_sinks, prefill, scale_log2, softcap_log2, tanh_scale,
    D: tl.constexpr, DV: tl.constexpr, HAS_SOFTCAP: tl.constexpr, GROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    m_n = o_n < length
    # [BLOCK_D, BLOCK_N]
    b_k = tl.load(
        k_base + o_n[None, :].to(tl.int64) * stride_kn + o_d[:, None], mask=m_n[None, :] & (o_d < D)[:, None], other=0.0
    )
    # [BLOCK_M, BLOCK_N]
    scores = tl.dot(b_q, b_k, input_precision=PRECISION) * scale_log2
    if HAS_SOFTCAP:
        scores = capped(scores, softcap_log2, tanh_scale, b_q.dtype == tl.float32)
    if GROWS:
        near = (o_n[None, :] >= o_oldest[:, None]) | (o_n[None, :] < num_sinks)
    else:
        near = (o_n[None, :] > o_m[:, None] - window) | (o_n[None, :] < num_sinks) | (o_m[:, None] < prefill)
    visible = (o_n[None, :] <= o_m[:, None]) & near & m_n[None, :]
    scores = tl.where(visible, scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    # a row that has seen nothing yet keeps -inf; subtracting it would give NaN
    safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    shrink = tl.exp2(row_max - safe_max)
    p = tl.exp2(scores - safe_max[:, None])
    # [BLOCK_N, BLOCK_DV]
    b_v = tl.load(
        v_base + o_n[:, None].to(tl.int64) * stride_vn + o_dv[None, :],
        mask=m_n[:, None] & (o_dv < DV)[None, :],
        other=0.0,
    )
    acc = acc * shrink[:, None] + tl.dot(p.to(b_v.dtype), b_v, input_precision=PRECISION)
    return acc, new_max, row_sum * shrink + tl.sum(p, 1)


@triton.jit(do_not_specialize=COUNTS)
def _window_attention_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, window_ptr, sink_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_om,
    before, length, num_sinks, prefill, tokens_per_block, skipped, scale_log2, softcap_log2, tanh_scale,
    NUM_Q_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_SINK: tl.constexpr, HAS_BEFORE: tl.constexpr, GROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # longest rows first: the last query blocks of a dense head are the most work
    i_m = tl.num_programs(0) - 1 - tl.program_id(0)
    i_b = (tl.program_id(1) // NUM_Q_HEADS).to(tl.int64)
    i_h = (tl.program_id(1) % NUM_Q_HEADS).to(tl.int64)
    window = tl.load(window_ptr + i_h // GROUP)
    first = i_m * BLOCK_M
    if HAS_BEFORE:  # the queries are those of the last tokens, and named by them from here on
        first += before
        q_ptr -= before.to(tl.int64) * stride_qm
        o_ptr -= before.to(tl.int64) * stride_om
    o_m = first + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    m_m = o_m < length
    # [BLOCK_M, BLOCK_D]
    b_q = tl.load(
        q_ptr + i_b * stride_qb + i_h * stride_qh + o_m[:, None].to(tl.int64) * stride_qm + o_d[None, :],
        mask=m_m[:, None] & (o_d < D)[None, :],
        other=0.0,
    )
    k_base = k_ptr + i_b * stride_kb + (i_h // GROUP) * stride_kh
    v_base = v_ptr + i_b * stride_vb + (i_h // GROUP) * stride_vh
    acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    if HAS_SINK:
        row_max = tl.zeros([BLOCK_M], dtype=tl.float32) + tl.load(sink_ptr + i_h).to(tl.float32) * TO_BASE_2
        row_sum += 1.0
    o_oldest = o_m  # not used
    oldest = tl.maximum(first - window + 1, 0)
    if GROWS:
        capacity = window + num_sinks
        # [BLOCK_M]
        o_oldest = _oldest(o_m + skipped, capacity, num_sinks, tokens_per_block) - skipped
        oldest = tl.maximum(_oldest(first + skipped, capacity, num_sinks, tokens_per_block) - skipped, 0)
    if first < prefill:
        oldest = 0
    oldest = oldest // BLOCK_N * BLOCK_N
    for start in range(0, tl.minimum(num_sinks, oldest), BLOCK_N):
        acc, row_max, row_sum = _attend_tile(
            acc, row_max, row_sum, b_q, k_base, v_base, start + tl.arange(0, BLOCK_N), o_m, o_oldest, o_d, o_dv,
            stride_kn, stride_vn, tl.minimum(length, oldest), window, num_sinks, prefill,
            scale_log2, softcap_log2, tanh_scale,
            D, DV, HAS_SOFTCAP, GROWS, PRECISION,
        )  # fmt: skip
    for start in range(oldest, tl.minimum(first + BLOCK_M, length), BLOCK_N):
        acc, row_max, row_sum = _attend_tile(
            acc, row_max, row_sum, b_q, k_base, v_base, start + tl.arange(0, BLOCK_N), o_m, o_oldest, o_d, o_dv,
            stride_kn, stride_vn, length, window, num_sinks, prefill, scale_log2, softcap_log2, tanh_scale,
            D, DV, HAS_SOFTCAP, GROWS, PRECISION,
        )  # fmt: skip
    # rows past the end may have seen nothing
    out = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    # [BLOCK_M, BLOCK_DV]
    tl.store(
        o_ptr + i_b * stride_ob + i_h * stride_oh + o_m[:, None].to(tl.int64) * stride_om + o_dv[None, :],
        out.to(o_ptr.dtype.element_ty),
        mask=m_m[:, None] & (o_dv < DV)[None, :],
    )


def launch_config(dtype: torch.dtype, dim: int, hopper: bool) -> dict[str, int]:
    """Tile sizes and launch options.

    hopper: compute capability 9.0 or later, whose tensor cores take their operands from shared memory

    16-bit tiles are the largest that compile without a spill on sm_80 and sm_90. fp32 products in three tf32 passes
    need registers for the split operands: from head dim 128 on, every tile of 16 rows or more spills a little.
    """
    if dtype != torch.float32:
        rows, stages = (128, 3) if dim <= 128 else (64, 2)
        columns = 64 if hopper or not 64 < dim <= 128 else 32
        return {"BLOCK_M": rows, "BLOCK_N": columns, "num_warps": 8, "num_stages": stages}
    tile = (64, 32) if dim <= 64 else (32, 32) if dim <= 128 else (16, 16)
    return {"BLOCK_M": tile[0], "BLOCK_N": tile[1], "num_warps": 4, "num_stages": 2}


@on_its_device
def triton_window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: Tensor,
    num_sink_tokens: int,
    scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
    prefill_length: int,
    tokens_per_block: int | None = None,
    skipped: int = 0,
) -> Tensor:
    """Shapes as in `window_attention`; window: int32 [num_kv_heads], capacity minus sinks, on the device."""
    batch, num_q_heads, count, dim = query.shape
    length = key.shape[2]
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    out = query.new_empty(batch, num_q_heads, count, value.shape[-1])
    config = launch_config(query.dtype, max(dim, value.shape[-1]), at_least_hopper(query.device))
    grid = (cdiv(count, config["BLOCK_M"]), batch * num_q_heads)
    _window_attention_kernel[grid](
        query, key, value, out, window, sink_logits,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3],
        length - count, length, num_sink_tokens, prefill_length, tokens_per_block or 0, skipped,
        scale * LOG2E, (softcap or 0.0) * LOG2E, 2.0 / (softcap or 1.0),
        NUM_Q_HEADS=num_q_heads, GROUP=num_q_heads // key.shape[1], D=dim, DV=value.shape[-1],
        BLOCK_D=max(16, next_power_of_2(dim)), BLOCK_DV=max(16, next_power_of_2(value.shape[-1])),
        HAS_SOFTCAP=softcap is not None, HAS_SINK=sink_logits is not None, HAS_BEFORE=count < length,
        GROWS=tokens_per_block is not None,
        # plain tf32 would lose three digits of an fp32 model
        PRECISION="tf32x3" if query.dtype == torch.float32 else "tf32", **config, **LAUNCH,
    )  # fmt: skip
    return out
