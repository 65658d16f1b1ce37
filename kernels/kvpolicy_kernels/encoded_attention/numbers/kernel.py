"""Triton: codes as numbers that products take, and what else is cheaper by an instruction of one's own.

PACKED: by instructions that the interpreter does not know, two codes at a time. Kernels call these; none is one itself.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def key_offset(PLANE, PLANES: tl.constexpr):
    """What the number of a key's code is above the code, where it is PACKED. PLANE: a tensor of ints"""
    return tl.where(PLANE % 2 == 0, 1024.0, 64.0 if PLANES == 4 else 1024.0)


@triton.jit
def key_numbers(b_word, PLANE: tl.constexpr, PLANES: tl.constexpr, PACKED: tl.constexpr, dtype: tl.constexpr):
    """Of a plane, the codes and what `key_offset` says. b_word: int16, of any shape."""
    BITS: tl.constexpr = 16 // PLANES
    if PACKED:
        # two at a time: their bits become the mantissas of 1024, or where they lie higher of 64. lop3 is (a & b) | c
        MASK: tl.constexpr = 0x00FF00FF if PLANES == 2 else 0x000F000F if PLANE % 2 == 0 else 0x00F000F0
        MAGIC: tl.constexpr = 0x64006400 if PLANES == 2 or PLANE % 2 == 0 else 0x54005400
        SHIFT: tl.constexpr = 8 * PLANE if PLANES == 2 else PLANE // 2 * 8
        if SHIFT:
            numbers = tl.inline_asm_elementwise(
                f"{{ .reg .b32 t; shr.b32 t, $1, {SHIFT}; lop3.b32 $0, t, {MASK}, {MAGIC}, 0xea; }}",
                "=r,r", [b_word], dtype=tl.float16, is_pure=True, pack=2,
            )  # fmt: skip
        else:
            numbers = tl.inline_asm_elementwise(
                f"lop3.b32 $0, $1, {MASK}, {MAGIC}, 0xea;",
                "=r,r", [b_word], dtype=tl.float16, is_pure=True, pack=2,
            )  # fmt: skip
    else:
        numbers = ((b_word >> (BITS * PLANE)) & (2**BITS - 1)).to(dtype)
    return numbers


@triton.jit
def value_numbers(b_word, PLANE: tl.constexpr, PLANES: tl.constexpr, PACKED: tl.constexpr, dtype: tl.constexpr):
    """Of a plane, the codes less MIDDLE."""
    BITS: tl.constexpr = 16 // PLANES
    MIDDLE: tl.constexpr = 2 ** (BITS - 1)
    numbers = key_numbers(b_word, PLANE, PLANES, PACKED, dtype)
    if PACKED:
        ABOVE: tl.constexpr = 0x64806480 if PLANES == 2 else 0x64086408 if PLANE % 2 == 0 else 0x54805480
        numbers = tl.inline_asm_elementwise(
            f"{{ .reg .b32 t; mov.b32 t, {ABOVE}; sub.f16x2 $0, $1, t; }}",
            "=r,r", [numbers], dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        numbers = numbers - MIDDLE
    return numbers


@triton.jit
def decoded(b_word, b_scales, PLANE: tl.constexpr, PLANES: tl.constexpr, PACKED: tl.constexpr, dtype: tl.constexpr):
    """Of a plane, what the codes stand for, as one rounding leaves it.

    word: int16 [BLOCK_N, BLOCK_W];  scales: as `step_and_zero` takes them
    """
    numbers = key_numbers(b_word, PLANE, PLANES, PACKED, dtype)
    if PACKED:
        ABOVE: tl.constexpr = 0x64006400 if PLANES == 2 or PLANE % 2 == 0 else 0x54005400
        step = (b_scales & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
        zero = (b_scales >> 16).to(tl.int16).to(tl.float16, bitcast=True)
        numbers = tl.inline_asm_elementwise(
            f"{{ .reg .b32 t; mov.b32 t, {ABOVE}; sub.f16x2 t, $1, t; fma.rn.f16x2 $0, t, $2, $3; }}",
            "=r,r,r,r", [numbers, step[:, None], zero[:, None]], dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        step, zero = step_and_zero(b_scales)
        numbers = (numbers.to(tl.float32) * step[:, None] + zero[:, None]).to(dtype)
    return numbers


@triton.jit
def fast_exp2(x, PACKED: tl.constexpr):
    """Without the steps that results below 2**-126 would take."""
    if PACKED:
        y = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )  # fmt: skip
    else:
        y = tl.exp2(x)
    return y


@triton.jit
def fast_log2(x, PACKED: tl.constexpr):
    if PACKED:
        y = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )  # fmt: skip
    else:
        y = tl.log2(x)
    return y


@triton.jit
def step_and_zero(b_scales):
    """Of int32 [BLOCK_N], two fp16 each: float32 twice."""
    step = (b_scales & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    zero = (b_scales >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return step, zero
