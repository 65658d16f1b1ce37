"""Triton: the pieces of a row are merged, rotated back, and meet what was found of the rows that are not encoded."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvpolicy_kernels.backend import LAUNCH
from kvpolicy_kernels.base2 import LN2
from kvpolicy_kernels.encoded_attention.exact.kernel import Exact
from kvpolicy_kernels.encoded_attention.rotation.kernel import mixed
from kvpolicy_kernels.formats import block_of, hadamard_signs
from kvpolicy_kernels.tiles import cdiv, next_power_of_2

TO_BASE_E = tl.constexpr(LN2)


@triton.jit
def _finish_kernel(
    part_ptr, part_lse_ptr, pieces_ptr, signs_ptr, exact_ptr, exact_lse_ptr, out_ptr, lse_ptr,
    DV: tl.constexpr, TURN_BLOCK: tl.constexpr, TURN_SCALE: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_DV: tl.constexpr, ROTATED: tl.constexpr, HAS_EXACT: tl.constexpr, HAS_LSE: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Program (i_s, i_r) takes a row of a segment. Arguments as of `finish`.

    signs: int8 [DV], `hadamard_signs`
    """
    i_s = tl.program_id(0)
    i_r = tl.program_id(1)
    num_rows = tl.num_programs(1)
    first, count = tl.load(pieces_ptr + i_s * 2), tl.load(pieces_ptr + i_s * 2 + 1)
    o_p = tl.arange(0, BLOCK_P)
    o_dv = tl.arange(0, BLOCK_DV)
    m_dv = o_dv < DV
    if EARLY:
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros([BLOCK_DV], dtype=tl.float32)
    total, peak = 0.0, float("-inf")
    for i_p in range(0, count, BLOCK_P):
        m_p = i_p + o_p < count
        rows = (first + i_p + o_p).to(tl.int64) * num_rows + i_r
        # [BLOCK_P] and [BLOCK_P, BLOCK_DV]
        b_lse = tl.load(part_lse_ptr + rows, mask=m_p, other=float("-inf"))
        b_part = tl.load(part_ptr + rows[:, None] * DV + o_dv[None, :], mask=m_p[:, None] & m_dv[None, :], other=0.0)
        new_peak = tl.maximum(peak, tl.max(b_lse, 0))
        # a row that has seen nothing yet keeps -inf; subtracting it would give NaN
        safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        shrink, weight = tl.exp2(peak - safe), tl.exp2(b_lse - safe)
        acc = acc * shrink + tl.sum(b_part * weight[:, None], 0)
        total = total * shrink + tl.sum(weight, 0)
        peak = new_peak
    row = i_s.to(tl.int64) * num_rows + i_r
    if ROTATED:
        acc = mixed(acc, TURN_BLOCK) * (tl.load(signs_ptr + o_dv, mask=m_dv, other=0) * TURN_SCALE)
    if HAS_EXACT:
        exact_lse = tl.load(exact_lse_ptr + row)
        new_peak = tl.maximum(peak, exact_lse)
        safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        shrink, weight = tl.exp2(peak - safe), tl.exp2(exact_lse - safe)
        acc = acc * shrink + tl.load(exact_ptr + row * DV + o_dv, mask=m_dv, other=0.0) * weight
        total = total * shrink + weight
        peak = new_peak
    # a query that has seen nothing gets zeros, and -inf
    safe_total = tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + row * DV + o_dv, (acc / safe_total).to(out_ptr.dtype.element_ty), mask=m_dv)
    if HAS_LSE:
        lse = tl.where(total == 0.0, float("-inf"), peak + tl.log2(safe_total))
        tl.store(lse_ptr + row, lse * TO_BASE_E)


def finish_config(pieces: int, dim: int) -> dict[str, int]:
    """Tile sizes and launch options. pieces: of a segment, as a rule;  dim: of values

    Measured on an H200 at head dim 128 among 4 to 64 pieces at a time and 1 to 4 warps, which would have to meet.
    """
    block_dv = max(16, next_power_of_2(dim))
    block_p = max(4, min(next_power_of_2(pieces), 4096 // block_dv))
    return {"BLOCK_P": block_p, "BLOCK_DV": block_dv, "num_warps": 1}


def finish(
    parts: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    lse: Tensor | None,
    exact: Exact | None,
    rotated: bool,
    early: bool,
) -> None:
    """Writes `out`, and `lse` where it is asked for.

    parts: float32 [P, rows, Dv], rotated or not, their log-sum-exps [P, rows] in base 2, and int32 [S, 2], the first
        piece of each segment, and how many it has
    out: [B, num_q_heads, n, Dv], contiguous;  lse: float32 [B, num_q_heads, n]
    early: the launch before lets this one begin before it ends
    """
    part, part_lse, pieces = parts
    num_segments, rows, value_dim = len(pieces), part.shape[1], part.shape[2]
    config = finish_config(cdiv(len(part), num_segments), value_dim)
    _finish_kernel[(num_segments, rows)](
        part, part_lse, pieces, hadamard_signs(value_dim, part.device) if rotated else None,
        *((None, None) if exact is None else exact), out, lse,
        DV=value_dim, TURN_BLOCK=block_of(value_dim), TURN_SCALE=block_of(value_dim) ** -0.5, ROTATED=rotated,
        HAS_EXACT=exact is not None, HAS_LSE=lse is not None, EARLY=early, **config, **LAUNCH,
        **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
