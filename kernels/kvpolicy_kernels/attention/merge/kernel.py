"""Triton: the pieces of each row, weighed by their log-sum-exps. A program takes one row of one segment."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpolicy_kernels.backend import LAUNCH
from kvpolicy_kernels.base2 import LN2, LOG2E
from kvpolicy_kernels.tiles import cdiv, next_power_of_2

TO_BASE_2, TO_BASE_E = tl.constexpr(LOG2E), tl.constexpr(LN2)


@triton.jit
def _merge_kernel(
    out_ptr, lse_ptr, part_ptr, part_lse_ptr, pieces_ptr, num_rows,
    DV: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_DV: tl.constexpr, HAS_LSE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The pieces of one row of a segment, weighed by their log-sum-exps."""
    i_s = tl.program_id(0)
    i_r = tl.program_id(1)
    first = tl.load(pieces_ptr + i_s * 2)
    count = tl.load(pieces_ptr + i_s * 2 + 1)
    if EARLY:
        tl.extra.cuda.gdc_wait()  # every program waits: a grid that ended without it would count as merged
    if count > 1:
        o_dv = tl.program_id(2) * BLOCK_DV + tl.arange(0, BLOCK_DV)
        m_dv = o_dv < DV
        acc = tl.zeros([BLOCK_P, BLOCK_DV], dtype=tl.float32)
        total = tl.zeros([BLOCK_P], dtype=tl.float32)
        peak = tl.full([BLOCK_P], float("-inf"), dtype=tl.float32)
        for i_p in range(0, count, BLOCK_P):
            o_p = i_p + tl.arange(0, BLOCK_P)
            m_p = o_p < count
            rows = (first + o_p).to(tl.int64) * num_rows + i_r
            # [BLOCK_P]
            b_lse = tl.load(part_lse_ptr + rows, mask=m_p, other=float("-inf"))
            # [BLOCK_P, BLOCK_DV]
            b_part = tl.load(
                part_ptr + rows[:, None] * DV + o_dv[None, :], mask=m_p[:, None] & m_dv[None, :], other=0.0
            )
            new_peak = tl.maximum(peak, b_lse)
            safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
            shrink = tl.exp2(peak - safe)
            weight = tl.exp2(b_lse - safe)
            acc = acc * shrink[:, None] + b_part * weight[:, None]
            total = total * shrink + weight
            peak = new_peak
        top = tl.max(peak, 0)
        safe = tl.where(top == float("-inf"), 0.0, top)
        weight = tl.exp2(peak - safe)
        norm = tl.sum(total * weight, 0)
        safe_norm = tl.where(norm == 0.0, 1.0, norm)
        result = tl.sum(acc * weight[:, None], 0) / safe_norm
        row = i_s.to(tl.int64) * num_rows + i_r
        tl.store(out_ptr + row * DV + o_dv, result.to(out_ptr.dtype.element_ty), mask=m_dv)
        if HAS_LSE:
            b_lse = tl.where(norm == 0.0, float("-inf"), safe + tl.log2(safe_norm))
            tl.store(lse_ptr + row, b_lse * TO_BASE_E)  # the programs of a row store the same


def merge_config(num_segments: int, num_programs: int, rows: int, value_dim: int) -> dict[str, int]:
    """Tile sizes and launch options of the merge. rows: of a segment.

    Few segments have many pieces each, and are cut small to use the whole device. Many have few, and then it counts
    how soon all programs have been launched: one warp each, two for head dims above 128.
    """
    block_dv = 32 if num_segments * rows * value_dim < 2**17 else next_power_of_2(value_dim)
    pieces = next_power_of_2(4 * num_programs // num_segments + 1)
    block_p = max(16, min(pieces, 4096 // block_dv))
    return {"BLOCK_P": block_p, "BLOCK_DV": block_dv, "num_warps": max(1, block_p // 32, block_dv // 128)}


def merge_pieces(
    out: Tensor, lse: Tensor | None, part: Tensor, part_lse: Tensor, pieces: Tensor, num_programs: int, early: bool
) -> None:
    """Writes `out`, and `lse` where it is asked for, for the segments of several pieces; the others' are there.

    out: [B, num_q_heads, n, Dv], contiguous, the rows of one segment behind those of the one before
    lse: float32 [B, num_q_heads, n];  part: float32 [P, rows, Dv];  part_lse: float32 [P, rows], in base 2
    pieces: int32 [S, 2], the first piece of each segment, and how many it has
    num_programs: that the pieces come from;  early: they let this launch begin before they end
    """
    num_segments, rows, value_dim = len(pieces), part.shape[1], part.shape[2]
    config = merge_config(num_segments, num_programs, rows, value_dim)
    _merge_kernel[(num_segments, rows, cdiv(value_dim, config["BLOCK_DV"]))](
        out, lse, part, part_lse, pieces, rows,
        DV=value_dim, HAS_LSE=lse is not None, EARLY=early, **config, **LAUNCH,
        **({"launch_pdl": True} if early else {}),
    )  # fmt: skip


def merge_parts(out: Tensor, lse: Tensor | None, part: Tensor, part_lse: Tensor, num_segments: int) -> None:
    """`merge_pieces`, of as many pieces for every segment."""
    first = torch.arange(0, len(part), len(part) // num_segments, dtype=torch.int32, device=part.device)
    pieces = torch.stack([first, torch.full_like(first, len(part) // num_segments)], 1)
    merge_pieces(out, lse, part, part_lse, pieces, len(part), early=False)
