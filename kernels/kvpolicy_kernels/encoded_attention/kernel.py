"""Triton: `attention/kernel.py` over codes, under the same plan and with the same merge, and a launch that finishes.

A row lies in words of several codes, which belong to as many planes: channels `j * W` to `(j + 1) * W - 1` are plane j,
with W words in a row. So no channel changes places between words and products. A code stands in a product as
`code - CENTRE`, a small number that fp16 holds exactly, whatever 16-bit dtype the model has; zeros move by as much.

A score is `step * (q . number) + zero * sum(q)`, and what a tile adds to the result is `weight . number` and
`sum(p * zero)`, with `weight = p * step`. fp16 has a short range: queries are divided by the largest of their row, and
steps by the largest of their tile, and both come back as fp32 factors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpolicy_kernels.attention.kernel import _mass_kernel, triton_plan
from kvpolicy_kernels.attention.merge.kernel import merge_pieces
from kvpolicy_kernels.attention.plan import WorkPlan, default_programs, unit_of
from kvpolicy_kernels.backend import LAUNCH, at_least_hopper, interpreted
from kvpolicy_kernels.base2 import LN2, LOG2E
from kvpolicy_kernels.encode.kernel import plane_of_rows
from kvpolicy_kernels.encoded_attention.finish.kernel import finish
from kvpolicy_kernels.formats import block_of, signed_hadamard
from kvpolicy_kernels.segments import Chunk, EncodedSegments
from kvpolicy_kernels.softcap.kernel import capped

TO_BASE_2, TO_BASE_E = tl.constexpr(LOG2E), tl.constexpr(LN2)
RANGE = tl.constexpr(2.0**-14)  # the largest weight is its inverse, so that fp16 reaches down to 2**-38 of it


@triton.jit
def _numbers(b_word, PLANE: tl.constexpr, PLANES: tl.constexpr, PACKED: tl.constexpr, dtype: tl.constexpr):
    """Of a plane, the codes less CENTRE. b_word: int16, of any shape."""
    BITS: tl.constexpr = 16 // PLANES
    CENTRE: tl.constexpr = 2 ** (BITS - 1)
    if PACKED:
        # two at a time: their bits become the mantissas of 1024, and 1024 + CENTRE is subtracted. lop3 is (a & b) | c
        if PLANES == 4:
            numbers = tl.inline_asm_elementwise(
                f"""{{ .reg .b32 t, u; mov.b32 u, 0x64086408; shr.b32 t, $1, {4 * PLANE};
                lop3.b32 t, t, 0x000f000f, 0x64006400, 0xea; sub.f16x2 $0, t, u; }}""",
                "=r,r", [b_word], dtype=tl.float16, is_pure=True, pack=2,
            )  # fmt: skip
        else:
            numbers = tl.inline_asm_elementwise(
                f"""{{ .reg .b32 t, u; mov.b32 u, 0x64806480; shr.b32 t, $1, {8 * PLANE};
                lop3.b32 t, t, 0x00ff00ff, 0x64006400, 0xea; sub.f16x2 $0, t, u; }}""",
                "=r,r", [b_word], dtype=tl.float16, is_pure=True, pack=2,
            )  # fmt: skip
    else:
        numbers = (((b_word >> (BITS * PLANE)) & (2**BITS - 1)) - CENTRE).to(dtype)
    return numbers


@triton.jit
def _step_and_zero(b_scales, CENTRE: tl.constexpr):
    """Of int32 [BLOCK_N], two fp16 each: float32 twice, the zero as that of `code - CENTRE`."""
    step = (b_scales & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    zero = (b_scales >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return step, zero + CENTRE * step


@triton.jit
def _added(
    acc, shrink, weights, b_word, top, shift,
    PLANE: tl.constexpr, PLANES: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A plane's sums with a tile's on top."""
    tile = tl.dot(weights, _numbers(b_word, PLANE, PLANES, PACKED, weights.dtype), input_precision=PRECISION)
    return acc * shrink[:, None] + (tile * top + shift[:, None])


@triton.jit
def _attend_codes(
    acc0, acc1, acc2, acc3, row_max, row_sum, q0, q1, q2, q3, q_sum, row_scale, b_kw, b_ks, b_vw, b_vs, visible,
    softcap_log2, tanh_scale, logits_ptrs, m_logits,
    MASKED: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_LOGITS: tl.constexpr, PLANES: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """row_scale: [BLOCK_M], the scale times log2(e), and what the row of q was divided by;  q_sum: [BLOCK_M]"""
    k_step, k_zero = _step_and_zero(b_ks, 2 ** (16 // PLANES - 1))
    v_step, v_zero = _step_and_zero(b_vs, 2 ** (16 // PLANES - 1))
    # [BLOCK_M, BLOCK_N]
    scores = tl.dot(q0, tl.trans(_numbers(b_kw, 0, PLANES, PACKED, q0.dtype)), input_precision=PRECISION)
    scores = tl.dot(q1, tl.trans(_numbers(b_kw, 1, PLANES, PACKED, q0.dtype)), scores, input_precision=PRECISION)
    if PLANES == 4:
        scores = tl.dot(q2, tl.trans(_numbers(b_kw, 2, PLANES, PACKED, q0.dtype)), scores, input_precision=PRECISION)
        scores = tl.dot(q3, tl.trans(_numbers(b_kw, 3, PLANES, PACKED, q0.dtype)), scores, input_precision=PRECISION)
    scores = (scores * k_step[None, :] + q_sum[:, None] * k_zero[None, :]) * row_scale[:, None]
    if HAS_SOFTCAP:
        scores = capped(scores, softcap_log2, tanh_scale, q0.dtype == tl.float32)
    if HAS_LOGITS:
        tl.store(logits_ptrs, scores, mask=m_logits)
    if MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    # a row that has seen nothing yet keeps -inf; subtracting it would give NaN
    safe_max = tl.where(new_max == float("-inf"), 0.0, new_max) if MASKED else new_max
    shrink = tl.exp2(row_max - safe_max)
    p = tl.exp2(scores - safe_max[:, None])
    top = tl.max(v_step, 0) * RANGE
    weights = (p * (v_step / tl.where(top == 0.0, 1.0, top))[None, :]).to(q0.dtype)
    shift = tl.sum(p * v_zero[None, :], 1)
    acc0 = _added(acc0, shrink, weights, b_vw, top, shift, 0, PLANES, PACKED, PRECISION)
    acc1 = _added(acc1, shrink, weights, b_vw, top, shift, 1, PLANES, PACKED, PRECISION)
    if PLANES == 4:
        acc2 = _added(acc2, shrink, weights, b_vw, top, shift, 2, PLANES, PACKED, PRECISION)
        acc3 = _added(acc3, shrink, weights, b_vw, top, shift, 3, PLANES, PACKED, PRECISION)
    return acc0, acc1, acc2, acc3, new_max, row_sum * shrink + tl.sum(p, 1)


@triton.jit
def _attend_kernel(
    q_ptr, turn_ptr, kw_ptr, ks_ptr, vw_ptr, vs_ptr, out_ptr, lse_ptr, part_ptr, part_lse_ptr, logits_ptr, sink_ptr,
    starts_ptr, lengths_ptr, units_ptr, quantum_ptr, programs_ptr,
    stride_qb, stride_qh, stride_qn, num_segments, num_kv_heads, group, n, scale_log2, softcap_log2, tanh_scale,
    D: tl.constexpr, DV: tl.constexpr, KW_ROW: tl.constexpr, KS_ROW: tl.constexpr, VW_ROW: tl.constexpr,
    VS_ROW: tl.constexpr, UNIT: tl.constexpr, PLANES: tl.constexpr, PACKED: tl.constexpr, TURN_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_WV: tl.constexpr, STAGES: tl.constexpr, ROTATED: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_SINK: tl.constexpr, HAS_LOGITS: tl.constexpr, HAS_LSE: tl.constexpr, EARLY: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """As `_attend_kernel` of `attention`, without a chunk; what it finds is in the basis in which values are encoded.

    kw:   int16 [R, D / PLANES], rows KW_ROW words apart;  vw: likewise of DV
    ks:   int32 [R], the step and the zero of each row in its halves, KS_ROW apart;  vs: likewise
    turn: int8 [D, D], `signed_hadamard`, which TURN_SCALE makes a rotation
    PACKED: two codes at a time, by instructions that the interpreter does not know, for 16-bit models
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    DTYPE: tl.constexpr = tl.float32 if q_ptr.dtype.element_ty == tl.float32 else tl.float16
    W: tl.constexpr = D // PLANES
    WV: tl.constexpr = DV // PLANES
    i_c = tl.program_id(1)
    i_s = tl.load(programs_ptr + i_c * 2)
    unit = tl.load(programs_ptr + i_c * 2 + 1)
    left = tl.load(quantum_ptr)
    num_rows = group * n
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    o_w = tl.arange(0, BLOCK_W)
    o_wv = tl.arange(0, BLOCK_WV)
    m_m = o_m < num_rows
    while (left > 0) & (i_s < num_segments):
        units = tl.load(units_ptr + i_s)
        length = tl.load(lengths_ptr + i_s).to(tl.int32)
        start = tl.load(starts_ptr + i_s).to(tl.int64)
        i_b = (i_s // num_kv_heads).to(tl.int64)
        i_h = (i_s % num_kv_heads).to(tl.int64)
        # [BLOCK_M]; row r is query r % n of the group's head r // n
        q_ptrs = q_ptr + i_b * stride_qb + (i_h * group + o_m // n) * stride_qh + (o_m % n) * stride_qn
        q0 = plane_of_rows(q_ptrs, turn_ptr, m_m, 0, D, W, BLOCK_D, BLOCK_W, TURN_SCALE, ROTATED, PRECISION)
        q1 = plane_of_rows(q_ptrs, turn_ptr, m_m, 1, D, W, BLOCK_D, BLOCK_W, TURN_SCALE, ROTATED, PRECISION)
        top = tl.maximum(tl.max(tl.abs(q0), 1), tl.max(tl.abs(q1), 1))
        q2, q3 = q0, q1
        if PLANES == 4:
            q2 = plane_of_rows(q_ptrs, turn_ptr, m_m, 2, D, W, BLOCK_D, BLOCK_W, TURN_SCALE, ROTATED, PRECISION)
            q3 = plane_of_rows(q_ptrs, turn_ptr, m_m, 3, D, W, BLOCK_D, BLOCK_W, TURN_SCALE, ROTATED, PRECISION)
            top = tl.maximum(top, tl.maximum(tl.max(tl.abs(q2), 1), tl.max(tl.abs(q3), 1)))
        top = tl.where(top == 0.0, 1.0, top)
        q0, q1 = (q0 / top[:, None]).to(DTYPE), (q1 / top[:, None]).to(DTYPE)
        q2, q3 = (q2 / top[:, None]).to(DTYPE), (q3 / top[:, None]).to(DTYPE)
        q_sum = tl.sum(q0.to(tl.float32), 1) + tl.sum(q1.to(tl.float32), 1)
        if PLANES == 4:
            q_sum += tl.sum(q2.to(tl.float32), 1) + tl.sum(q3.to(tl.float32), 1)
        row_scale = top * scale_log2
        take = tl.minimum(left, units - unit)
        is_last = unit + take == units
        # the first unit of a segment stands for the cost of beginning it
        begin = tl.minimum(tl.maximum(unit - 1, 0) * UNIT, length)
        end = tl.minimum(tl.maximum(unit + take - 1, 0) * UNIT, length)
        end = tl.where(is_last, length, end)
        full = begin + (end - begin) // BLOCK_N * BLOCK_N
        acc0 = tl.zeros([BLOCK_M, BLOCK_WV], dtype=tl.float32)
        acc1 = acc0
        acc2 = acc0
        acc3 = acc0
        row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
        if HAS_SINK:  # it takes part once, in the first piece of a segment
            # [BLOCK_M]
            sink = tl.load(sink_ptr + i_h * group + o_m // n, mask=m_m, other=0.0).to(tl.float32)
            row_max = tl.where(unit == 0, sink * TO_BASE_2, float("-inf"))
            row_sum += tl.where(unit == 0, 1.0, 0.0)
        kw_ptrs = kw_ptr + (start + begin) * KW_ROW + o_n[:, None] * KW_ROW + o_w[None, :]
        vw_ptrs = vw_ptr + (start + begin) * VW_ROW + o_n[:, None] * VW_ROW + o_wv[None, :]
        ks_ptrs = ks_ptr + (start + begin) * KS_ROW + o_n * KS_ROW
        vs_ptrs = vs_ptr + (start + begin) * VS_ROW + o_n * VS_ROW
        logits_ptrs = kw_ptrs  # not used
        if HAS_LOGITS:
            logits_ptrs = logits_ptr + (start + begin) * num_rows + o_n[None, :] * num_rows + o_m[:, None]
        for _ in tl.range(begin, full, BLOCK_N, num_stages=STAGES):
            # [BLOCK_N, BLOCK_W], [BLOCK_N, BLOCK_WV], and [BLOCK_N] twice; all rows of a full tile are entries
            b_kw = tl.load(kw_ptrs) if W == BLOCK_W else tl.load(kw_ptrs, mask=(o_w < W)[None, :], other=0)
            b_vw = tl.load(vw_ptrs) if WV == BLOCK_WV else tl.load(vw_ptrs, mask=(o_wv < WV)[None, :], other=0)
            b_ks, b_vs = tl.load(ks_ptrs), tl.load(vs_ptrs)
            acc0, acc1, acc2, acc3, row_max, row_sum = _attend_codes(
                acc0, acc1, acc2, acc3, row_max, row_sum, q0, q1, q2, q3, q_sum, row_scale,
                b_kw, b_ks, b_vw, b_vs,
                m_m[:, None], softcap_log2, tanh_scale, logits_ptrs, m_m[:, None],
                False, HAS_SOFTCAP, HAS_LOGITS, PLANES, PACKED, PRECISION,
            )  # fmt: skip
            kw_ptrs += BLOCK_N * KW_ROW
            vw_ptrs += BLOCK_N * VW_ROW
            ks_ptrs += BLOCK_N * KS_ROW
            vs_ptrs += BLOCK_N * VS_ROW
            if HAS_LOGITS:
                logits_ptrs += BLOCK_N * num_rows
        if full < end:
            m_n = full + o_n < end
            # [BLOCK_N, BLOCK_W], [BLOCK_N, BLOCK_WV], and [BLOCK_N] twice; scales behind the segment may be NaN
            b_kw = tl.load(kw_ptrs, mask=m_n[:, None] & (o_w < W)[None, :], other=0)
            b_vw = tl.load(vw_ptrs, mask=m_n[:, None] & (o_wv < WV)[None, :], other=0)
            b_ks, b_vs = tl.load(ks_ptrs, mask=m_n, other=0), tl.load(vs_ptrs, mask=m_n, other=0)
            acc0, acc1, acc2, acc3, row_max, row_sum = _attend_codes(
                acc0, acc1, acc2, acc3, row_max, row_sum, q0, q1, q2, q3, q_sum, row_scale,
                b_kw, b_ks, b_vw, b_vs,
                m_n[None, :], softcap_log2, tanh_scale, logits_ptrs, m_m[:, None] & m_n[None, :],
                True, HAS_SOFTCAP, HAS_LOGITS, PLANES, PACKED, PRECISION,
            )  # fmt: skip
        # a query that has seen nothing gets zeros, and -inf
        safe_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
        b_lse = tl.where(row_sum == 0.0, float("-inf"), row_max + tl.log2(safe_sum))
        whole = (unit == 0) & is_last  # nothing to merge
        rows = tl.where(whole, i_s, i_c + i_s).to(tl.int64) * num_rows + o_m
        if whole:
            _store_planes(out_ptr, acc0, acc1, acc2, acc3, safe_sum, rows, m_m, DV, WV, BLOCK_WV, PLANES)
            if HAS_LSE:
                tl.store(lse_ptr + rows, b_lse * TO_BASE_E, mask=m_m)
        else:
            _store_planes(part_ptr, acc0, acc1, acc2, acc3, safe_sum, rows, m_m, DV, WV, BLOCK_WV, PLANES)
            tl.store(part_lse_ptr + rows, b_lse, mask=m_m)
        left -= take
        i_s += 1
        unit = 0


@triton.jit
def _store_planes(
    ptr, acc0, acc1, acc2, acc3, row_sum, rows, m_m,
    DV: tl.constexpr, WV: tl.constexpr, BLOCK_WV: tl.constexpr, PLANES: tl.constexpr,
):  # fmt: skip
    o_wv = tl.arange(0, BLOCK_WV)
    m_out = m_m[:, None] & (o_wv < WV)[None, :]
    ptrs = ptr + rows[:, None] * DV + o_wv[None, :]
    tl.store(ptrs, (acc0 / row_sum[:, None]).to(ptr.dtype.element_ty), mask=m_out)
    tl.store(ptrs + WV, (acc1 / row_sum[:, None]).to(ptr.dtype.element_ty), mask=m_out)
    if PLANES == 4:
        tl.store(ptrs + 2 * WV, (acc2 / row_sum[:, None]).to(ptr.dtype.element_ty), mask=m_out)
        tl.store(ptrs + 3 * WV, (acc3 / row_sum[:, None]).to(ptr.dtype.element_ty), mask=m_out)


def launch_config(dtype: torch.dtype, dim: int, with_mass: bool) -> dict[str, int]:
    """Tile sizes and launch options of the first kernel.

    dim: the larger of D and Dv;  with_mass: scores are written, which takes registers of its own

    The largest tiles that compile without a spill on sm_80 and sm_90 in 16 bits; others have not been timed.
    More rows than BLOCK_M go to programs side by side, which find the entries in the L2 cache.
    """
    if dtype == torch.float32:
        block_n, stages, warps = 32, 2, 4
    elif dim > 128:
        block_n, stages, warps = 64, 2, 8
    else:
        block_n, stages, warps = 64 if with_mass else 128, 3, 4
    return {"BLOCK_M": 16, "BLOCK_N": block_n, "STAGES": stages, "num_warps": warps}


def plane_block(dim: int, planes: int) -> int:
    """Channels of a plane's tile. Narrower result tiles than 32 would be computed by every warp."""
    return max(32 if planes == 4 else 16, triton.next_power_of_2(dim // planes))


def triton_encoded_attention(
    query: Tensor,
    segments: EncodedSegments,
    chunk: Chunk | None,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    plan: WorkPlan | None = None,
    with_lse: bool = False,
    with_mass: bool = False,
    mass_power: float = 1.0,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Shapes as in `encoded_attention`."""
    segments = segments.on(query.device)
    (key_words, key_scales), (value_words, value_scales) = segments.keys, segments.values
    entry_format, lengths = segments.entry_format, segments.lengths
    batch, num_q_heads, n, dim = query.shape
    num_segments, value_dim = len(segments), value_words.shape[1] * entry_format.codes_in_word
    num_kv_heads = num_segments // batch
    group = num_q_heads // num_kv_heads
    rows, planes, widest = group * n, entry_format.codes_in_word, max(dim, value_dim)
    if plan is None:
        plan = triton_plan(lengths, default_programs(lengths.device), unit_of(widest))
    num_programs, rotated = plan.programs.shape[0], entry_format.rotated
    query = query if query.stride(-1) == 1 else query.contiguous()
    single, finishes = torch.float32, rotated or chunk is not None
    out = query.new_empty(batch, num_q_heads, n, value_dim)
    mid = query.new_empty(out.shape, dtype=single) if finishes else out
    lse = query.new_empty(out.shape[:3], dtype=single) if with_lse or with_mass or finishes else None
    logits = query.new_empty(len(key_words), rows, dtype=single) if with_mass else None
    parts = query.new_empty(num_programs + num_segments, rows, value_dim, dtype=single)
    part_lse = query.new_empty(num_programs + num_segments, rows, dtype=single)
    config = launch_config(query.dtype, widest, with_mass)
    early = at_least_hopper(query.device)
    turn = signed_hadamard(dim, query.device) if rotated else None
    _attend_kernel[(triton.cdiv(rows, config["BLOCK_M"]), num_programs)](
        query, turn, key_words, halves(key_scales), value_words, halves(value_scales),
        mid, lse, parts, part_lse, logits, sink_logits,
        segments.starts, lengths, plan.units, plan.quantum, plan.programs,
        *query.stride()[:3], num_segments, num_kv_heads, group, n,
        scale * LOG2E, (softcap or 0.0) * LOG2E, 2.0 / (softcap or 1.0), D=dim, DV=value_dim,
        KW_ROW=key_words.stride(0), KS_ROW=key_scales.stride(0) // 2,
        VW_ROW=value_words.stride(0), VS_ROW=value_scales.stride(0) // 2,
        UNIT=plan.unit, PLANES=planes, PACKED=query.dtype != single and not interpreted(),
        TURN_SCALE=block_of(dim) ** -0.5, BLOCK_D=max(16, triton.next_power_of_2(dim)),
        BLOCK_W=max(16, triton.next_power_of_2(dim // planes)),
        BLOCK_WV=plane_block(value_dim, planes),
        ROTATED=rotated, HAS_SOFTCAP=softcap is not None, HAS_SINK=sink_logits is not None, HAS_LOGITS=with_mass,
        HAS_LSE=lse is not None, EARLY=early,
        # plain tf32 would lose three digits of an fp32 model
        PRECISION="tf32x3" if query.dtype == single else "tf32", **config, **LAUNCH,
    )  # fmt: skip
    merge_pieces(mid, lse, parts, part_lse, plan.pieces, num_programs, early)
    if lse is not None and finishes:
        finish(mid, lse, out, query, chunk, num_kv_heads, scale, softcap, rotated)
    if logits is None:
        return out, lse if with_lse else None, None
    mass = query.new_zeros(len(key_words), dtype=single)
    _mass_kernel[(num_segments, triton.cdiv(4 * num_programs, num_segments))](
        mass, logits, lse, segments.starts, lengths, rows, mass_power,
        BLOCK_M=triton.next_power_of_2(rows), BLOCK_N=64, **LAUNCH,
    )  # fmt: skip
    return out, lse if with_lse else None, mass


def halves(scales: Tensor) -> Tensor:
    """float16 [R, 2] as int32 [R, 1]: one load takes both, and is wide enough to be pipelined."""
    return scales.view(torch.int32)
