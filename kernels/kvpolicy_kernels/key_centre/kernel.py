"""Triton: how far the parts of a key centre that turn have come. Kernels call this; it is none itself."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from kvpolicy_kernels.key_centre.centre import CIRCLE

HALF, QUARTER = tl.constexpr(CIRCLE // 2), tl.constexpr(CIRCLE // 4)
TURN = tl.constexpr(2 * math.pi)


@triton.jit
def wave(b_position, b_frequency, b_index, FAST: tl.constexpr):
    """What coefficient 1 + index of `KeyCentre` is multiplied by: a cosine, or a sine where the index is odd.

    b_position, b_frequency, b_index: int32, of shapes that fit each other; their product wraps as angles do
    FAST: by an instruction that the interpreter does not know, off by 2**-20 at most

    Half a circle further, the first 23 bits are the mantissa of a number in [1, 2): no conversion, which would take as
    long as the cosine.
    """
    b_parts = b_position * b_frequency + tl.where(b_index % 2 == 0, -HALF, QUARTER)
    b_place = ((b_parts >> 9) & 0x7FFFFF | 0x3F800000).to(tl.float32, bitcast=True)
    b_angle = (b_place - 1.5) * TURN
    if FAST:
        b_wave = tl.inline_asm_elementwise(
            "cos.approx.ftz.f32 $0, $1;", "=f,f", [b_angle], dtype=tl.float32, is_pure=True, pack=1
        )  # fmt: skip
    else:
        b_wave = tl.cos(b_angle)
    return b_wave
