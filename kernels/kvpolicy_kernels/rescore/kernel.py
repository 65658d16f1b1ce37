"""Triton: one pass over the rows of an arena."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, uint8

from kvpolicy_kernels.backend import LAUNCH, on_its_device
from kvpolicy_kernels.tiles import cdiv

BLOCK = 1024


@triton.jit(do_not_specialize=["num_rows"])
def _rescore_kernel(scores_ptr, new_ptr, positions_ptr, fault_ptr, num_rows, BLOCK: tl.constexpr):
    o_r = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_r = o_r < num_rows
    # [BLOCK]
    score = tl.load(new_ptr + o_r, mask=m_r, other=0.0)
    position = tl.load(positions_ptr + o_r, mask=m_r, other=-1)
    score = tl.where(position >= 0, score, float("-inf"))
    tl.store(scores_ptr + o_r, score, mask=m_r)
    if tl.max((score != score).to(tl.int32)) > 0:  # whoever finds one writes the same
        tl.store(fault_ptr, 1)


@on_its_device
def triton_rescore(scores: Tensor, new: Tensor, positions: Tensor, fault: Tensor) -> None:
    """Shapes as in `rescore`."""
    if num_rows := len(scores):
        _rescore_kernel[(cdiv(num_rows, BLOCK),)](
            scores, new, positions, fault.view(uint8), num_rows, BLOCK=BLOCK, num_warps=4, **LAUNCH
        )
