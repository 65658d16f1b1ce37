"""Triton: scores that are capped softly, as Gemma 2 has them. Kernels call it; it is none by itself."""

from __future__ import annotations

import triton
import triton.language as tl

from kvpolicy_kernels.base2 import LN2

HALF_LN2 = tl.constexpr(0.5 * LN2)


@triton.jit
def capped(scores, softcap_log2, tanh_scale, SINGLE: tl.constexpr):
    """The scores as softcap * tanh(x / softcap), with x and the result in units of log2(e).

    softcap_log2: softcap times log2(e);  tanh_scale: 2 / softcap
    SINGLE: the scores are exact to float32. Small ones lose digits in the difference, which 16 bits would not show.
    """
    out = softcap_log2 * (1.0 - 2.0 / (1.0 + tl.exp2(scores * tanh_scale)))
    if SINGLE:
        x = scores * (tanh_scale * HALF_LN2)
        x2 = x * x  # of the series of tanh, whose next term is under half a digit of float32 there
        small = x * (1.0 + x2 * (-1.0 / 3.0 + x2 * (2.0 / 15.0 + x2 * (-17.0 / 315.0 + x2 * (62.0 / 2835.0)))))
        out = tl.where(tl.abs(x) < 0.25, softcap_log2 * small, out)
    return out
