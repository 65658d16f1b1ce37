"""Triton: a row is mixed by sums and differences; no matrix is read. Kernels call these; none is one itself."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mixed(x, BLOCK: tl.constexpr):
    """A row times Hadamard matrices of size BLOCK along the diagonal: each step mixes what is 1, 2, 4, ... apart.

    Few instructions, which are fetched for every launch anew: products with the matrix took longer to fetch than to do.
    """
    SIZE: tl.constexpr = x.shape[0]
    o_i = tl.arange(0, 2)[None, :, None]
    for step in tl.static_range(BLOCK.bit_length() - 1):
        pairs = tl.reshape(x, [SIZE >> (step + 1), 2, 1 << step])
        sums = tl.sum(pairs, 1, keep_dims=True)
        differences = tl.sum(tl.where(o_i == 0, pairs, -pairs), 1, keep_dims=True)
        x = tl.reshape(tl.where(o_i == 0, sums, differences), [SIZE])
    return x
