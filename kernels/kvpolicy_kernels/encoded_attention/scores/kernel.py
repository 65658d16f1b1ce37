"""Triton: scores of a tile of codes, for queries that `turn` has turned. Kernels call these; none is one itself."""

from __future__ import annotations

import triton
import triton.language as tl

from kvpolicy_kernels.encoded_attention.numbers.kernel import key_numbers
from kvpolicy_kernels.encoded_attention.turn.kernel import CENTRE_SCALE
from kvpolicy_kernels.key_centre.kernel import wave
from kvpolicy_kernels.softcap.kernel import capped


@triton.jit
def turned_tile(
    q_ptr, sums_ptr, of_centre_ptr, q_rows, m_m, D: tl.constexpr, PLANES: tl.constexpr, BLOCK_W: tl.constexpr,
    COEFFICIENTS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Rows of `turn`'s, as `code_products` and `code_scores` take them. q_rows: int64 [BLOCK_M], among all segments'

    Returns planes of queries [BLOCK_W, BLOCK_M], offset, sum, scale, and what a centre that does not turn adds
    [BLOCK_M], and high and low [BLOCK_C, BLOCK_M], that add up to what turns.
    """
    W: tl.constexpr = D // PLANES
    o_w = tl.arange(0, BLOCK_W)
    o_c = tl.arange(0, BLOCK_C)
    m_q = (o_w < W)[:, None] & m_m[None, :]
    q_ptrs = q_ptr + q_rows[None, :] * D + o_w[:, None]
    q0 = tl.load(q_ptrs, mask=m_q, other=0.0)
    q1 = tl.load(q_ptrs + W, mask=m_q, other=0.0)
    q2, q3 = q0, q1
    if PLANES == 4:
        q2 = tl.load(q_ptrs + 2 * W, mask=m_q, other=0.0)
        q3 = tl.load(q_ptrs + 3 * W, mask=m_q, other=0.0)
    q_offset = tl.load(sums_ptr + q_rows * 3, mask=m_m, other=0.0)
    q_sum = tl.load(sums_ptr + q_rows * 3 + 1, mask=m_m, other=0.0)
    row_scale = tl.load(sums_ptr + q_rows * 3 + 2, mask=m_m, other=1.0)
    q_centre, b_high, b_low = q_sum, o_c, o_c  # not used
    if COEFFICIENTS:
        centre_ptrs, m_c = of_centre_ptr + q_rows * COEFFICIENTS, o_c < COEFFICIENTS - 1
        q_centre = tl.load(centre_ptrs, mask=m_m, other=0.0)
    if COEFFICIENTS > 1:
        b_turning = tl.load(centre_ptrs[None, :] + 1 + o_c[:, None], mask=m_c[:, None] & m_m[None, :], other=0.0)
        b_high = b_turning.to(q0.dtype)
        b_low = (b_turning - b_high.to(tl.float32)).to(q0.dtype)
    return q0, q1, q2, q3, q_offset, q_sum, row_scale, q_centre, b_high, b_low


@triton.jit
def centre_frequency(frequency_ptr, i_h, COEFFICIENTS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Of each coefficient that turns, int32 [BLOCK_C]; anything where none does."""
    o_c = tl.arange(0, BLOCK_C)
    b_frequency = o_c
    if COEFFICIENTS > 1:
        ptrs = frequency_ptr + i_h * (COEFFICIENTS // 2) + o_c // 2
        b_frequency = tl.load(ptrs, mask=o_c < COEFFICIENTS - 1, other=0)
    return b_frequency


@triton.jit
def centre_wave(b_position, b_frequency, COEFFICIENTS: tl.constexpr, PACKED: tl.constexpr, dtype: tl.constexpr):
    """[BLOCK_N, BLOCK_C], for a product, so that no wave is worked out in two threads; anything where nothing turns."""
    b_wave = b_position
    if COEFFICIENTS > 1:
        o_c = tl.arange(0, b_frequency.shape[0])
        b_wave = wave(b_position[:, None], b_frequency[None, :], o_c[None, :], PACKED).to(dtype)
    return b_wave


@triton.jit
def code_products(
    b_kw, k_step, k_zero, q0, q1, q2, q3, q_offset, q_sum, PLANES: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N, BLOCK_M], of keys as their codes say them. `code_scores` makes scores of them.

    kw: int16 [BLOCK_N, BLOCK_W];  step, zero: float32 [BLOCK_N];  rest: see `turned_tile`
    """
    dtype: tl.constexpr = q0.dtype
    products = tl.broadcast_to(-q_offset[None, :], [k_step.shape[0], q_offset.shape[0]])
    products = tl.dot(key_numbers(b_kw, 0, PLANES, PACKED, dtype), q0, products, input_precision=PRECISION)
    products = tl.dot(key_numbers(b_kw, 1, PLANES, PACKED, dtype), q1, products, input_precision=PRECISION)
    if PLANES == 4:
        products = tl.dot(key_numbers(b_kw, 2, PLANES, PACKED, dtype), q2, products, input_precision=PRECISION)
        products = tl.dot(key_numbers(b_kw, 3, PLANES, PACKED, dtype), q3, products, input_precision=PRECISION)
    return products * k_step[:, None] + q_sum[None, :] * k_zero[:, None]


@triton.jit
def code_scores(
    products, b_wave, row_scale, q_centre, b_high, b_low, softcap_log2, tanh_scale, COEFFICIENTS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, SINGLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N, BLOCK_M], in base 2. products: see `code_products`;  wave: see `centre_wave`;  rest: see `turned_tile`

    SINGLE: see `capped`
    """
    scores = products
    if COEFFICIENTS > 1:
        scores = tl.dot(b_wave, b_low, scores * (1.0 / CENTRE_SCALE), input_precision=PRECISION)
        scores = tl.dot(b_wave, b_high, scores, input_precision=PRECISION) * CENTRE_SCALE
    scores *= row_scale[None, :]
    if COEFFICIENTS:
        scores += q_centre[None, :]
    if HAS_SOFTCAP:
        scores = capped(scores, softcap_log2, tanh_scale, SINGLE)
    return scores
