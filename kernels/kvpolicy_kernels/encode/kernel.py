"""Triton: a program encodes some rows of one tensor. See `encoded_attention/kernel.py` for planes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpolicy_kernels.backend import LAUNCH, on_its_device
from kvpolicy_kernels.formats import Encoded, EntryFormat, block_of, signed_hadamard
from kvpolicy_kernels.key_centre.kernel import wave
from kvpolicy_kernels.tiles import cdiv

LARGEST = tl.constexpr(65504.0)  # of fp16
TO_NEAREST = tl.constexpr(1.5 * 2.0**23)  # what is added to it loses its fraction, as torch rounds


@triton.jit
def _centre_of(centre, o_d, m_m, mask, COEFFICIENTS: tl.constexpr, FAST: tl.constexpr):
    """float32 [BLOCK_M, any], the channels o_d of `KeyCentre.of`. centre: as in `plane_of_rows`;  mask: of o_d, too"""
    ptrs, stride, frequency_ptrs, b_position = centre
    ptrs = ptrs[:, None] + o_d[None, :]
    b_centre = tl.load(ptrs, mask=mask, other=0.0)
    for i in range(COEFFICIENTS - 1):  # side by side they would take too many registers
        b_wave = wave(b_position, tl.load(frequency_ptrs + i // 2, mask=m_m, other=0), i, FAST)
        b_centre += b_wave[:, None] * tl.load(ptrs + (1 + i) * stride, mask=mask, other=0.0)
    return b_centre


@triton.jit
def plane_of_rows(
    row_ptrs, centre, turn_ptr, m_m, PLANE: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr, TURN_SCALE: tl.constexpr, ROTATED: tl.constexpr,
    COEFFICIENTS: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """float32 [BLOCK_M, BLOCK_W], the channels of a plane, rotated or not. row_ptrs: [BLOCK_M], of contiguous rows

    centre: where there are COEFFICIENTS, what rows are taken less of: pointers [BLOCK_M] to the first ones of a head,
        how far it is to the next ones, pointers [BLOCK_M] to its frequencies, and positions int32 [BLOCK_M]
    turn: int8 [D, D], `signed_hadamard`, which TURN_SCALE makes a rotation
    """
    o_w = tl.arange(0, BLOCK_W)
    m_w = (o_w < W)[None, :]
    if ROTATED:
        b_sum = tl.zeros([row_ptrs.shape[0], BLOCK_W], dtype=tl.float32)
        STEP: tl.constexpr = min(BLOCK_D, 32 if COEFFICIENTS else 64)  # more at once would take too many registers
        for first in tl.static_range(0, BLOCK_D, STEP):
            o_d = first + tl.arange(0, STEP)
            m_d = o_d < D
            # [BLOCK_M, STEP] and [STEP, BLOCK_W]
            m_row = m_m[:, None] & m_d[None, :]
            b_row = tl.load(row_ptrs[:, None] + o_d[None, :], mask=m_row, other=0.0)
            if COEFFICIENTS:
                b_row = b_row.to(tl.float32) - _centre_of(centre, o_d, m_m, m_row, COEFFICIENTS, FAST)
            b_turn = tl.load(turn_ptr + o_d[:, None] * D + (PLANE * W + o_w)[None, :], mask=m_d[:, None] & m_w, other=0)
            b_sum = tl.dot(b_row, b_turn.to(b_row.dtype), b_sum, input_precision=PRECISION)
        b_plane = b_sum * TURN_SCALE
    else:
        # [BLOCK_M, BLOCK_W]
        o_c = PLANE * W + o_w
        b_plane = tl.load(row_ptrs[:, None] + o_c[None, :], mask=m_m[:, None] & m_w, other=0.0).to(tl.float32)
        if COEFFICIENTS:
            b_plane -= _centre_of(centre, o_c, m_m, m_m[:, None] & m_w, COEFFICIENTS, FAST)
    return b_plane


@triton.jit
def _scales(low, high, LEVELS: tl.constexpr):
    """Step and zero of rows with these least and largest numbers, both as fp16."""
    zero = tl.minimum(tl.maximum(low, -LARGEST), LARGEST).to(tl.float16)
    from_zero = zero.to(tl.float32)
    step = tl.div_rn(high - from_zero, tl.full(low.shape, LEVELS, tl.float32))
    return tl.minimum(tl.maximum(step, 0.0), LARGEST).to(tl.float16), zero


@triton.jit
def _codes(b_row, step, zero, LEVELS: tl.constexpr):
    """int32 [BLOCK_R, any]. b_row: float32"""
    safe = tl.where(step == 0.0, 1.0, step.to(tl.float32))
    place = tl.div_rn(b_row - zero.to(tl.float32)[:, None], tl.broadcast_to(safe[:, None], b_row.shape))
    return ((tl.minimum(tl.maximum(place, 0.0), LEVELS) + TO_NEAREST) - TO_NEAREST).to(tl.int32)


@triton.jit
def encoded_rows(
    row_ptrs, centre, turn_ptr, m_r, D: tl.constexpr, PLANES: tl.constexpr, TURN_SCALE: tl.constexpr,
    ROTATED: tl.constexpr, COEFFICIENTS: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Words int32 [BLOCK_R, BLOCK_W], steps and zeros. Pointers as in `plane_of_rows`"""
    W: tl.constexpr = D // PLANES
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    BITS: tl.constexpr = 16 // PLANES
    LEVELS: tl.constexpr = 2**BITS - 1
    if D == BLOCK_D:  # planes are parts of one tile
        b_row = plane_of_rows(
            row_ptrs, centre, turn_ptr, m_r, 0, D, D, D, D, TURN_SCALE, ROTATED, COEFFICIENTS, FAST, PRECISION
        )  # fmt: skip
        step, zero = _scales(tl.min(b_row, 1), tl.max(b_row, 1), LEVELS)
        code = _codes(b_row, step, zero, LEVELS) << (tl.arange(0, D) // W * BITS)[None, :]
        word = tl.sum(tl.reshape(code, [row_ptrs.shape[0], PLANES, W]), 1)
    else:
        BLOCK_W: tl.constexpr = max(16, triton.next_power_of_2(W))
        m_w = (tl.arange(0, BLOCK_W) < W)[None, :]
        low = tl.full(row_ptrs.shape, float("inf"), dtype=tl.float32)
        high = tl.full(row_ptrs.shape, float("-inf"), dtype=tl.float32)
        for j in tl.static_range(PLANES):
            b_plane = plane_of_rows(
                row_ptrs, centre, turn_ptr, m_r, j, D, W, BLOCK_D, BLOCK_W, TURN_SCALE, ROTATED, COEFFICIENTS, FAST,
                PRECISION,
            )  # fmt: skip
            low = tl.minimum(low, tl.min(tl.where(m_w, b_plane, float("inf")), 1))
            high = tl.maximum(high, tl.max(tl.where(m_w, b_plane, float("-inf")), 1))
        step, zero = _scales(low, high, LEVELS)
        word = tl.zeros([row_ptrs.shape[0], BLOCK_W], dtype=tl.int32)
        for j in tl.static_range(PLANES):  # once more: they are in the L1 cache, and would be many registers
            b_plane = plane_of_rows(
                row_ptrs, centre, turn_ptr, m_r, j, D, W, BLOCK_D, BLOCK_W, TURN_SCALE, ROTATED, COEFFICIENTS, FAST,
                PRECISION,
            )  # fmt: skip
            word = word | (_codes(b_plane, step, zero, LEVELS) << (BITS * j))
    return word, step, zero


@triton.jit
def store_encoded(word_ptr, scale_ptr, places, m_r, word, step, zero, W: tl.constexpr):
    """places: int64 [BLOCK_R], the rows that they become"""
    o_w = tl.arange(0, word.shape[1])
    m_word = m_r[:, None] & (o_w < W)[None, :]
    tl.store(word_ptr + places[:, None] * W + o_w[None, :], word.to(tl.int16), mask=m_word)
    tl.store(scale_ptr + places * 2, step, mask=m_r)
    tl.store(scale_ptr + places * 2 + 1, zero, mask=m_r)


@triton.jit
def _encode_kernel(
    row_ptrs, turn_ptrs, word_ptrs, scale_ptrs, counts,
    DIMS: tl.constexpr, TURN_SCALES: tl.constexpr, BLOCK_R: tl.constexpr, PLANES: tl.constexpr,
    ROTATED: tl.constexpr, SINGLES: tl.constexpr,
):  # fmt: skip
    """Program (i_r, i) takes BLOCK_R rows of tensor i.

    rows: [count, D], contiguous;  words: int16 [count, D / PLANES];  scales: float16 [count, 2]
    SINGLES: which tensors are float32; before triton 3.7 a tuple could hold no string
    """
    o_r = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    for i in tl.static_range(len(DIMS)):
        if tl.program_id(1) == i:
            m_r = o_r < counts[i]
            word, step, zero = encoded_rows(
                row_ptrs[i] + o_r * DIMS[i], (), turn_ptrs[i], m_r, DIMS[i], PLANES, TURN_SCALES[i], ROTATED, 0, False,
                "tf32x3" if SINGLES[i] else "tf32",  # 16 bits and signs are exact in tf32
            )  # fmt: skip
            store_encoded(word_ptrs[i], scale_ptrs[i], o_r, m_r, word, step, zero, DIMS[i] // PLANES)


def launch_config() -> dict[str, int]:
    """Launch options: the fewest rows that a product has, and warps among which a row of head dim 256 fits."""
    return {"BLOCK_R": 16, "num_warps": 8}


@on_its_device
def triton_encode(rows: Sequence[Tensor], entry_format: EntryFormat) -> list[Encoded]:
    """Shapes as in `encode`."""
    flat = [tensor.reshape(-1, tensor.shape[-1]).contiguous() for tensor in rows]
    dims = tuple(tensor.shape[1] for tensor in flat)
    planes = entry_format.codes_in_word
    words = [x.new_empty(len(x), dim // planes, dtype=torch.int16) for x, dim in zip(flat, dims, strict=True)]
    scales = [x.new_empty(len(x), 2, dtype=torch.float16) for x in flat]
    most = max(len(x) for x in flat)
    config = launch_config()
    if most:
        _encode_kernel[(cdiv(most, config["BLOCK_R"]), len(flat))](
            tuple(flat), tuple(signed_hadamard(dim, x.device) for x, dim in zip(flat, dims, strict=True)),
            tuple(words), tuple(scales), tuple(len(x) for x in flat),
            DIMS=dims, TURN_SCALES=tuple(block_of(dim) ** -0.5 for dim in dims), PLANES=planes,
            ROTATED=entry_format.rotated, SINGLES=tuple(x.dtype == torch.float32 for x in flat), **config, **LAUNCH,
        )  # fmt: skip
    return [
        Encoded(word.view(*tensor.shape[:-1], word.shape[1]), scale.view(*tensor.shape[:-1], 2))
        for tensor, word, scale in zip(rows, words, scales, strict=True)
    ]
