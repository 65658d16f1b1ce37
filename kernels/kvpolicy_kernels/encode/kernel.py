"""Triton: a program encodes some rows of one tensor, plane by plane. See `encoded_attention/kernel.py` for planes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpolicy_kernels.backend import LAUNCH, on_its_device
from kvpolicy_kernels.formats import Encoded, EntryFormat, block_of, signed_hadamard

LARGEST = tl.constexpr(65504.0)  # of fp16
TO_NEAREST = tl.constexpr(1.5 * 2.0**23)  # what is added to it loses its fraction, as torch rounds


@triton.jit
def plane_of_rows(
    row_ptrs, turn_ptr, m_m, PLANE: tl.constexpr, D: tl.constexpr, W: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_W: tl.constexpr, TURN_SCALE: tl.constexpr, ROTATED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """float32 [BLOCK_M, BLOCK_W], the channels of a plane, rotated or not. row_ptrs: [BLOCK_M], of contiguous rows

    turn: int8 [D, D], `signed_hadamard`, which TURN_SCALE makes a rotation
    """
    o_w = tl.arange(0, BLOCK_W)
    m_w = (o_w < W)[None, :]
    if ROTATED:
        b_sum = tl.zeros([row_ptrs.shape[0], BLOCK_W], dtype=tl.float32)
        STEP: tl.constexpr = min(BLOCK_D, 64)  # more at once would take too many registers
        for first in tl.static_range(0, BLOCK_D, STEP):
            o_d = first + tl.arange(0, STEP)
            m_d = o_d < D
            # [BLOCK_M, STEP] and [STEP, BLOCK_W]
            b_row = tl.load(row_ptrs[:, None] + o_d[None, :], mask=m_m[:, None] & m_d[None, :], other=0.0)
            b_turn = tl.load(turn_ptr + o_d[:, None] * D + (PLANE * W + o_w)[None, :], mask=m_d[:, None] & m_w, other=0)
            b_sum = tl.dot(b_row, b_turn.to(b_row.dtype), b_sum, input_precision=PRECISION)
        b_plane = b_sum * TURN_SCALE
    else:
        # [BLOCK_M, BLOCK_W]
        b_plane = tl.load(
            row_ptrs[:, None] + (PLANE * W + o_w)[None, :], mask=m_m[:, None] & m_w, other=0.0
        ).to(tl.float32)  # fmt: skip
    return b_plane


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
    for i in tl.static_range(len(DIMS)):
        if tl.program_id(1) == i:
            _encode_rows(
                row_ptrs[i], turn_ptrs[i], word_ptrs[i], scale_ptrs[i], counts[i], DIMS[i], DIMS[i] // PLANES,
                TURN_SCALES[i], BLOCK_R, PLANES, ROTATED, SINGLES[i],
            )  # fmt: skip


@triton.jit
def _encode_rows(
    row_ptr, turn_ptr, word_ptr, scale_ptr, count, D: tl.constexpr, W: tl.constexpr, TURN_SCALE: tl.constexpr,
    BLOCK_R: tl.constexpr, PLANES: tl.constexpr, ROTATED: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    PRECISION: tl.constexpr = "tf32x3" if SINGLE else "tf32"  # 16 bits and signs are exact in tf32
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    BLOCK_W: tl.constexpr = max(16, triton.next_power_of_2(W))
    LEVELS: tl.constexpr = 2 ** (16 // PLANES) - 1
    o_r = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    m_r = o_r < count
    o_w = tl.arange(0, BLOCK_W)
    m_w = (o_w < W)[None, :]
    low = tl.full([BLOCK_R], float("inf"), dtype=tl.float32)
    high = tl.full([BLOCK_R], float("-inf"), dtype=tl.float32)
    for j in tl.static_range(PLANES):
        b_plane = plane_of_rows(
            row_ptr + o_r * D, turn_ptr, m_r, j, D, W, BLOCK_D, BLOCK_W, TURN_SCALE, ROTATED, PRECISION
        )
        low = tl.minimum(low, tl.min(tl.where(m_w, b_plane, float("inf")), 1))
        high = tl.maximum(high, tl.max(tl.where(m_w, b_plane, float("-inf")), 1))
    zero = tl.minimum(tl.maximum(low, -LARGEST), LARGEST).to(tl.float16)
    from_zero = zero.to(tl.float32)
    step = tl.minimum(tl.maximum(tl.div_rn(high - from_zero, tl.full([BLOCK_R], LEVELS, tl.float32)), 0.0), LARGEST)
    step = step.to(tl.float16)
    safe = tl.where(step == 0.0, 1.0, step.to(tl.float32))
    word = tl.zeros([BLOCK_R, BLOCK_W], dtype=tl.int32)
    for j in tl.static_range(PLANES):  # the planes once more: they are in the L1 cache, and would be many registers
        b_plane = plane_of_rows(
            row_ptr + o_r * D, turn_ptr, m_r, j, D, W, BLOCK_D, BLOCK_W, TURN_SCALE, ROTATED, PRECISION
        )
        place = tl.div_rn(b_plane - from_zero[:, None], tl.broadcast_to(safe[:, None], [BLOCK_R, BLOCK_W]))
        code = (tl.minimum(tl.maximum(place, 0.0), LEVELS) + TO_NEAREST) - TO_NEAREST
        word = word | (code.to(tl.int32) << (16 // PLANES * j))
    tl.store(word_ptr + o_r[:, None] * W + o_w[None, :], word.to(tl.int16), mask=m_r[:, None] & m_w)
    tl.store(scale_ptr + o_r * 2, step, mask=m_r)
    tl.store(scale_ptr + o_r * 2 + 1, zero, mask=m_r)


def launch_config(count: int) -> dict[str, int]:
    """Launch options. count: of rows; 16 are the fewest that a product has."""
    return {"BLOCK_R": 16, "num_warps": 4 if count > 16 else 2}


@on_its_device
def triton_encode(rows: Sequence[Tensor], entry_format: EntryFormat) -> list[Encoded]:
    """Shapes as in `encode`."""
    flat = [tensor.reshape(-1, tensor.shape[-1]).contiguous() for tensor in rows]
    dims = tuple(tensor.shape[1] for tensor in flat)
    planes = entry_format.codes_in_word
    words = [x.new_empty(len(x), dim // planes, dtype=torch.int16) for x, dim in zip(flat, dims, strict=True)]
    scales = [x.new_empty(len(x), 2, dtype=torch.float16) for x in flat]
    most = max(len(x) for x in flat)
    config = launch_config(most)
    if most:
        _encode_kernel[(triton.cdiv(most, config["BLOCK_R"]), len(flat))](
            tuple(flat), tuple(signed_hadamard(dim, x.device) for x, dim in zip(flat, dims, strict=True)),
            tuple(words), tuple(scales), tuple(len(x) for x in flat),
            DIMS=dims, TURN_SCALES=tuple(block_of(dim) ** -0.5 for dim in dims), PLANES=planes,
            ROTATED=entry_format.rotated, SINGLES=tuple(x.dtype == torch.float32 for x in flat), **config, **LAUNCH,
        )  # fmt: skip
    return [
        Encoded(word.view(*tensor.shape[:-1], word.shape[1]), scale.view(*tensor.shape[:-1], 2))
        for tensor, word, scale in zip(rows, words, scales, strict=True)
    ]
