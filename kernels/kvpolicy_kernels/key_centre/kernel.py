"""Triton: how far the parts of a key centre that turn have come. Kernels call this; it is none itself."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from kvpolicy_kernels.key_centre.centre import CIRCLE

RADIANS = tl.constexpr(2 * math.pi / CIRCLE)
QUARTER = tl.constexpr(CIRCLE // 4)


@triton.jit
def wave(b_position, b_frequency, b_index, FAST: tl.constexpr):
    """What coefficient 1 + index of `KeyCentre` is multiplied by: a cosine, or a sine where the index is odd.

    b_position, b_frequency, b_index: int32, of shapes that fit each other; their product wraps as angles do
    FAST: by an instruction that the interpreter does not know, off by 2**-20 at most
    """
    b_angle = (b_position * b_frequency - b_index % 2 * QUARTER).to(tl.float32) * RADIANS
    if FAST:
        b_wave = tl.inline_asm_elementwise(
            "cos.approx.ftz.f32 $0, $1;", "=f,f", [b_angle], dtype=tl.float32, is_pure=True, pack=1
        )  # fmt: skip
    else:
        b_wave = tl.cos(b_angle)
    return b_wave
