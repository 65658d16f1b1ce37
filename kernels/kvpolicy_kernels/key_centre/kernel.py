"""Triton: how far the parts of a key centre that turn have come. Kernels call this; it is none itself."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from kvpolicy_kernels.key_centre.centre import CIRCLE

RADIANS = tl.constexpr(2 * math.pi / CIRCLE)


@triton.jit
def cos_and_sin(b_position, frequency, FAST: tl.constexpr):
    """float32, of positions int32 and frequencies int32 of `KeyCentre`, whose product wraps as angles do.

    FAST: by instructions that the interpreter does not know, off by 2**-20 at most
    """
    b_angle = (b_position * frequency).to(tl.float32) * RADIANS
    if FAST:
        cos = tl.inline_asm_elementwise(
            "cos.approx.ftz.f32 $0, $1;", "=f,f", [b_angle], dtype=tl.float32, is_pure=True, pack=1
        )  # fmt: skip
        sin = tl.inline_asm_elementwise(
            "sin.approx.ftz.f32 $0, $1;", "=f,f", [b_angle], dtype=tl.float32, is_pure=True, pack=1
        )  # fmt: skip
    else:
        cos, sin = tl.cos(b_angle), tl.sin(b_angle)
    return cos, sin
