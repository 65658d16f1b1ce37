"""Triton: `attention/kernel.py` over codes, under a plan of the same kind.

A row lies in words of several codes, which belong to as many planes: channels `j * W` to `(j + 1) * W - 1` are plane j,
with W words in a row. So no channel changes places between words and products. A program is one warp, which takes
tiles of entries through products whose rows are entries, or channels of values, and whose columns are queries: few
queries fill those, nothing is shared between warps, and no warp waits for another.

The code of a key takes part in a product as a number a fixed offset above it, which is the mantissa that it becomes by
one instruction; `turn` works out what the offsets add up to. That of a value does as `code - MIDDLE`, because sums over
many entries would lose digits beside an offset; zeros move by as much. So a score is `step * (q . number - offsets) +
zero * sum(q)`, and the result is the sum of `weight . number` and of `p * zero`, with `weight = p * step`. fp16 has a
short range: rows of queries are divided by their largest number, and exponents are counted from the largest weight.
Where keys were encoded less a centre, a score besides has `q . centre`, whose coefficients `turn` works out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpolicy_kernels.attention.kernel import triton_plan
from kvpolicy_kernels.attention.plan import WorkPlan, unit_of
from kvpolicy_kernels.backend import LAUNCH, at_least_hopper, interpreted, on_its_device
from kvpolicy_kernels.base2 import LOG2E
from kvpolicy_kernels.encoded_attention.exact.kernel import attend_exact
from kvpolicy_kernels.encoded_attention.finish.kernel import finish
from kvpolicy_kernels.encoded_attention.numbers.kernel import fast_exp2, fast_log2, step_and_zero, value_numbers
from kvpolicy_kernels.encoded_attention.programs import encoded_programs
from kvpolicy_kernels.encoded_attention.scores.kernel import (
    centre_frequency,
    centre_wave,
    code_products,
    code_scores,
    turned_tile,
)
from kvpolicy_kernels.encoded_attention.turn.kernel import NEVER, turned
from kvpolicy_kernels.segments import Chunk, EncodedSegments, ExactCopies
from kvpolicy_kernels.tiles import cdiv, next_power_of_2

TO_BASE_2 = tl.constexpr(LOG2E)
RANGE = tl.constexpr(14.0)  # the largest weight is 2**14, so that fp16 reaches down to 2**-38 of it
LEAST_STEP = tl.constexpr(2.0**-24)  # of those above 0


@triton.jit
def _attend_codes(
    acc0, acc1, acc2, acc3, row_max, row_sum, shift, q0, q1, q2, q3, q_offset, q_sum, row_scale,
    q_centre, b_high, b_low, b_frequency, b_position, b_kw, b_ks, b_vw, b_vs, seen, softcap_log2, tanh_scale,
    logits_ptrs, m_logits, COEFFICIENTS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_LOGITS: tl.constexpr,
    PLANES: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """seen: bool [BLOCK_N]; scales of what is not may be NaN;  rest: see `code_products` and what is behind it"""
    MIDDLE: tl.constexpr = 2 ** (16 // PLANES - 1)
    dtype: tl.constexpr = q0.dtype
    k_step, k_zero = step_and_zero(tl.where(seen, b_ks, 0))
    v_step, v_zero = step_and_zero(tl.where(seen, b_vs, 0))
    bias = tl.where(seen, 0.0, float("-inf"))[:, None]
    v_zero += MIDDLE * v_step
    # [BLOCK_N, BLOCK_M]
    scores = code_products(b_kw, k_step, k_zero, q0, q1, q2, q3, q_offset, q_sum, PLANES, PACKED, PRECISION)
    b_wave = centre_wave(b_position, b_frequency, COEFFICIENTS, PACKED, dtype)
    scores = code_scores(
        scores, b_wave, row_scale, q_centre, b_high, b_low, softcap_log2, tanh_scale, COEFFICIENTS, HAS_SOFTCAP,
        dtype == tl.float32, PRECISION,
    )  # fmt: skip
    scores += bias
    if HAS_LOGITS:
        tl.store(logits_ptrs, scores, mask=m_logits)
    reach = fast_log2(tl.maximum(v_step, LEAST_STEP), PACKED) - RANGE
    new_max = tl.maximum(row_max, tl.max(scores + reach[:, None], 0))
    # a row that has seen nothing yet keeps -inf; subtracting it would give NaN
    safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    shrink = fast_exp2(row_max - safe_max, PACKED)
    p = fast_exp2(scores - safe_max[None, :], PACKED)
    weights = (p * v_step[:, None]).to(dtype)
    shift = shift * shrink + tl.sum(p * v_zero[:, None], 0)
    row_sum = row_sum * shrink + tl.sum(p, 0)
    shrink = shrink[None, :]
    # [BLOCK_WV, BLOCK_M]
    acc0 = tl.dot(value_numbers(b_vw, 0, PLANES, PACKED, dtype), weights, acc0 * shrink, input_precision=PRECISION)
    acc1 = tl.dot(value_numbers(b_vw, 1, PLANES, PACKED, dtype), weights, acc1 * shrink, input_precision=PRECISION)
    if PLANES == 4:
        acc2 = tl.dot(value_numbers(b_vw, 2, PLANES, PACKED, dtype), weights, acc2 * shrink, input_precision=PRECISION)
        acc3 = tl.dot(value_numbers(b_vw, 3, PLANES, PACKED, dtype), weights, acc3 * shrink, input_precision=PRECISION)
    return acc0, acc1, acc2, acc3, new_max, row_sum, shift


@triton.jit
def _table(i_s, num_segments, units_ptr, lengths_ptr, starts_ptr):
    """Of a segment, its units, its length and its first row; of the last one where there is none."""
    i_s = tl.minimum(i_s, num_segments - 1)
    return (
        tl.load(units_ptr + i_s),
        tl.load(lengths_ptr + i_s).to(tl.int32),
        tl.load(starts_ptr + i_s).to(tl.int64),
    )


@triton.jit
def _fetch(ptr, row, num_entries, ROW: tl.constexpr, COUNT: tl.constexpr):
    """Has the L2 cache fetch rows, as far as there are any, in lines of 128 bytes. ptr: to int16"""
    o_line = tl.arange(0, triton.next_power_of_2((COUNT * ROW + 63) // 64)) * 64
    if num_entries > 0:
        place = tl.minimum(row * ROW + o_line, tl.cast(num_entries, tl.int64) * ROW - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l", [(ptr + place).to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _loaded(ptrs, mask, WHOLE: tl.constexpr):
    return tl.load(ptrs) if WHOLE else tl.load(ptrs, mask=mask, other=0)


@triton.jit
def _attend_kernel(
    q_ptr, sums_ptr, of_centre_ptr, frequency_ptr, kw_ptr, ks_ptr, vw_ptr, vs_ptr, positions_ptr, since_ptr,
    part_ptr, part_lse_ptr, logits_ptr, sink_ptr, starts_ptr, lengths_ptr, units_ptr, quantum_ptr,
    programs_ptr, num_segments, num_kv_heads, group, n, num_entries, num_sinks, softcap_log2, tanh_scale,
    D: tl.constexpr, DV: tl.constexpr, KW_ROW: tl.constexpr, KS_ROW: tl.constexpr, VW_ROW: tl.constexpr,
    VS_ROW: tl.constexpr, UNIT: tl.constexpr, PLANES: tl.constexpr, PACKED: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_WV: tl.constexpr, STAGES: tl.constexpr,
    COEFFICIENTS: tl.constexpr, BLOCK_C: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SINK: tl.constexpr,
    HAS_LOGITS: tl.constexpr, ROOMY: tl.constexpr, HIDES: tl.constexpr, EARLY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As `_attend_kernel` of `attention`, without a chunk; what it finds is in the basis in which values are encoded.

    All of it is a piece, of a whole segment, too: `finish` makes the result of them.

    q, sums, since: see `turn`;  positions: int32 [R], of the entries
    kw:   int16 [R, D / PLANES], rows KW_ROW words apart;  vw: likewise of DV
    ks:   int32 [R], the step and the zero of each row in its halves, KS_ROW apart;  vs: likewise
    ROOMY: the arena has at least BLOCK_N of `num_entries`
    HIDES: entries before position `num_sinks` and from `since` on do not count
    PACKED: by instructions that the interpreter does not know, two codes at a time, for 16-bit models
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
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
    units, length, start = _table(i_s, num_segments, units_ptr, lengths_ptr, starts_ptr)
    if EARLY:  # while `turn` runs, which is waited for
        ahead = start + tl.minimum(tl.maximum(unit - 1, 0) * UNIT, length)
        _fetch(kw_ptr, ahead, num_entries, KW_ROW, BLOCK_N * (STAGES - 1))
        _fetch(vw_ptr, ahead, num_entries, VW_ROW, BLOCK_N * (STAGES - 1))
        tl.extra.cuda.gdc_wait()
    while (left > 0) & (i_s < num_segments):
        i_h = (i_s % num_kv_heads).to(tl.int64)
        # row r is query r % n of the group's head r // n
        q_rows = i_s.to(tl.int64) * num_rows + o_m
        q0, q1, q2, q3, q_offset, q_sum, row_scale, q_centre, b_high, b_low = turned_tile(
            q_ptr, sums_ptr, of_centre_ptr, q_rows, m_m, D, PLANES, BLOCK_W, COEFFICIENTS, BLOCK_C
        )
        b_frequency = centre_frequency(frequency_ptr, i_h, COEFFICIENTS, BLOCK_C)
        span = 0
        if HIDES:  # positions between the sinks and the last ones
            span = tl.maximum(tl.load(since_ptr + i_s) - num_sinks, 0).to(tl.uint32)
        take = tl.minimum(left, units - unit)
        is_last = unit + take == units
        # the first unit of a segment stands for the cost of beginning it
        begin = tl.minimum(tl.maximum(unit - 1, 0) * UNIT, length)
        end = tl.minimum(tl.maximum(unit + take - 1, 0) * UNIT, length)
        end = tl.where(is_last, length, end)
        acc0 = tl.zeros([BLOCK_WV, BLOCK_M], dtype=tl.float32)
        acc1 = acc0
        acc2 = acc0
        acc3 = acc0
        row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
        shift = tl.zeros([BLOCK_M], dtype=tl.float32)
        if HAS_SINK:  # it takes part once, in the first piece of a segment
            # [BLOCK_M]
            sink = tl.load(sink_ptr + i_h * group + o_m // n, mask=m_m, other=0.0).to(tl.float32)
            row_max = tl.where(unit == 0, sink * TO_BASE_2 - RANGE, float("-inf"))
            row_sum += tl.where(unit == 0, tl.exp2(RANGE), 0.0)
        o_k, o_v = o_n[:, None] * KW_ROW + o_w[None, :], o_n[None, :] * VW_ROW + o_wv[:, None]
        m_n = o_n < num_entries
        m_k, m_v = m_n[:, None] & (o_w < W)[None, :], m_n[None, :] & (o_wv < WV)[:, None]
        for place in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
            # the last tile of the arena begins where it still is one, with rows of others in front
            row = tl.minimum(start + place, tl.maximum(num_entries - BLOCK_N, 0))
            others = (start + place - row).to(tl.int32)
            # [BLOCK_N, BLOCK_W], [BLOCK_WV, BLOCK_N], and [BLOCK_N] twice
            b_kw = _loaded(kw_ptr + row * KW_ROW + o_k, m_k, ROOMY and W == BLOCK_W)
            b_vw = _loaded(vw_ptr + row * VW_ROW + o_v, m_v, ROOMY and WV == BLOCK_WV)
            b_ks = _loaded(ks_ptr + row * KS_ROW + o_n * KS_ROW, m_n, ROOMY)
            b_vs = _loaded(vs_ptr + row * VS_ROW + o_n * VS_ROW, m_n, ROOMY)
            m_own = (o_n - others).to(tl.uint32) < (end - place).to(tl.uint32)
            seen = m_own
            b_position = o_n  # not used
            if HIDES or COEFFICIENTS > 1:
                b_position = _loaded(positions_ptr + row + o_n, m_n, ROOMY)  # [BLOCK_N]
                if HIDES:
                    seen = (tl.where(m_own, b_position, NEVER) - num_sinks).to(tl.uint32) < span
            logits_ptrs = o_k  # not used
            if HAS_LOGITS:
                logits_ptrs = logits_ptr + row * num_rows + o_n[:, None] * num_rows + o_m[None, :]
            acc0, acc1, acc2, acc3, row_max, row_sum, shift = _attend_codes(
                acc0, acc1, acc2, acc3, row_max, row_sum, shift, q0, q1, q2, q3, q_offset, q_sum, row_scale,
                q_centre, b_high, b_low, b_frequency, b_position, b_kw, b_ks, b_vw, b_vs, seen, softcap_log2,
                tanh_scale, logits_ptrs, m_own[:, None] & m_m[None, :], COEFFICIENTS, HAS_SOFTCAP, HAS_LOGITS,
                PLANES, PACKED, PRECISION,
            )  # fmt: skip
        # a query that has seen nothing gets zeros, and -inf
        safe_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
        b_lse = tl.where(row_sum == 0.0, float("-inf"), row_max + tl.log2(safe_sum))
        rows = (i_c + i_s).to(tl.int64) * num_rows + o_m
        _store_planes(part_ptr, acc0, acc1, acc2, acc3, shift, safe_sum, rows, m_m, DV, WV, BLOCK_WV, PLANES)
        tl.store(part_lse_ptr + rows, b_lse, mask=m_m)
        left -= take
        i_s += 1
        unit = 0
        units, length, start = _table(i_s, num_segments, units_ptr, lengths_ptr, starts_ptr)


@triton.jit
def _store_planes(
    ptr, acc0, acc1, acc2, acc3, shift, row_sum, rows, m_m,
    DV: tl.constexpr, WV: tl.constexpr, BLOCK_WV: tl.constexpr, PLANES: tl.constexpr,
):  # fmt: skip
    o_wv = tl.arange(0, BLOCK_WV)
    m_out = (o_wv < WV)[:, None] & m_m[None, :]
    ptrs = ptr + rows[None, :] * DV + o_wv[:, None]
    shift, scale = shift[None, :], (1.0 / row_sum)[None, :]
    tl.store(ptrs, (acc0 + shift) * scale, mask=m_out)
    tl.store(ptrs + WV, (acc1 + shift) * scale, mask=m_out)
    if PLANES == 4:
        tl.store(ptrs + 2 * WV, (acc2 + shift) * scale, mask=m_out)
        tl.store(ptrs + 3 * WV, (acc3 + shift) * scale, mask=m_out)


@triton.jit
def _mass_kernel(
    mass_ptr, logits_ptr, lse_ptr, positions_ptr, since_ptr, copies_ptr, starts_ptr, lengths_ptr,
    num_rows, slots, num_sinks, power, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HIDES: tl.constexpr,
):  # fmt: skip
    """As that of `attention`; an entry that has a copy gets the copy's. copies: float32 [S, slots]"""
    i_s = tl.program_id(0)
    start = tl.load(starts_ptr + i_s).to(tl.int64)
    length = tl.load(lengths_ptr + i_s).to(tl.int32)
    o_m = tl.arange(0, BLOCK_M)
    m_m = o_m < num_rows
    # [BLOCK_M]
    b_lse = tl.load(lse_ptr + i_s.to(tl.int64) * num_rows + o_m, mask=m_m, other=0.0) * TO_BASE_2
    for first in range(tl.program_id(1) * BLOCK_N, length, tl.num_programs(1) * BLOCK_N):
        o_n = first + tl.arange(0, BLOCK_N)
        m_n = o_n < length
        # [BLOCK_N, BLOCK_M]
        b_logits = tl.load(
            logits_ptr + (start + o_n)[:, None] * num_rows + o_m[None, :],
            mask=m_n[:, None] & m_m[None, :],
            other=float("-inf"),
        )
        b_mass = tl.sum(tl.exp2((b_logits - b_lse[None, :]) * power), 1)
        if HIDES:
            # [BLOCK_N]
            b_position = tl.load(positions_ptr + start + o_n, mask=m_n, other=0)
            is_sink = b_position < num_sinks
            hidden = m_n & (is_sink | (b_position >= tl.load(since_ptr + i_s)))
            slot = tl.where(is_sink, b_position, num_sinks + b_position % (slots - num_sinks))
            b_copy = tl.load(copies_ptr + i_s.to(tl.int64) * slots + slot, mask=hidden, other=0.0)
            b_mass = tl.where(hidden, b_copy, b_mass)
        tl.store(mass_ptr + start + o_n, b_mass, mask=m_n)


def launch_config(dtype: torch.dtype, dim: int, planes: int, rows: int, turns: bool = False) -> dict[str, int]:
    """Tile sizes and launch options of the kernel over codes.

    dim: the larger of D and Dv;  rows: queries times query heads of a group;  turns: whether the centre of keys does

    Measured on an H200 at head dim 128 among tiles of 16 to 64 entries, 2 to 5 stages, and fewer registers; the others
    are the tiles that compile without a spill on sm_80 and sm_90 in 16 bits. More rows than BLOCK_M go to programs side
    by side, which find the entries in the L2 cache.
    """
    words = next_power_of_2(dim // planes)
    block_m = 8 if rows <= 8 else 16
    halved = (words > 32) + (words > 64) + (words * planes > dim or dtype == torch.float32)
    halved += (block_m > 8) + turns * ((block_m > 8) + (dim > 128))
    most = 64 if words <= 16 else 32 if planes == 4 or words <= 32 else 16
    stages = 4 if planes == 4 and words <= 32 else 3
    return {"BLOCK_M": block_m, "BLOCK_N": max(16, min(most, 64 >> halved)), "STAGES": stages, "num_warps": 1}


@on_its_device
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
    copies: ExactCopies | None = None,
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
        plan = triton_plan(lengths, encoded_programs(lengths.device), unit_of(widest))
    num_programs, rotated = plan.programs.shape[0], entry_format.rotated
    query = query if query.stride(-1) == 1 else query.contiguous()
    arriving, slots = chunk, None
    if copies is not None and chunk is not None:
        arriving = copies.before(chunk, n)
    elif copies is not None:
        arriving, slots = Chunk(copies.key, copies.value), copies.positions
    single = torch.float32
    out = query.new_empty(batch, num_q_heads, n, value_dim)
    lse = query.new_empty(out.shape[:3], dtype=single) if with_lse or with_mass else None
    logits = query.new_empty(len(key_words), rows, dtype=single) if with_mass else None
    parts = query.new_empty(num_programs + num_segments, rows, value_dim, dtype=single)
    part_lse = query.new_empty(num_programs + num_segments, rows, dtype=single)
    early, packed = at_least_hopper(query.device), query.dtype != single and not interpreted()
    centre, positions = segments.key_centre, segments.positions
    coefficients = 0 if centre is None else len(centre.coefficients)
    config = launch_config(query.dtype, widest, planes, rows, coefficients > 1)
    exact = None if arriving is None else attend_exact(query, arriving, slots, scale, softcap, early)
    turned_query, sums, of_centre, since = turned(
        query, num_kv_heads, planes, scale * LOG2E, rotated=rotated, packed=packed,
        centre=centre, copies=copies, early=early, behind=early and exact is not None,
    )  # fmt: skip
    num_sinks = 0 if copies is None else copies.num_sinks
    _attend_kernel[(cdiv(rows, config["BLOCK_M"]), num_programs)](
        turned_query, sums, of_centre, None if centre is None else centre.frequencies, key_words, halves(key_scales),
        value_words, halves(value_scales), positions, since, parts, part_lse, logits, sink_logits,
        segments.starts, lengths, plan.units, plan.quantum, plan.programs,
        num_segments, num_kv_heads, group, n, len(key_words), num_sinks,
        (softcap or 0.0) * LOG2E, 2.0 / (softcap or 1.0),
        D=dim, DV=value_dim, KW_ROW=key_words.stride(0), KS_ROW=key_scales.stride(0) // 2,
        VW_ROW=value_words.stride(0), VS_ROW=value_scales.stride(0) // 2,
        UNIT=plan.unit, PLANES=planes, PACKED=packed,
        BLOCK_W=plane_block(dim, planes), BLOCK_WV=plane_block(value_dim, planes),
        COEFFICIENTS=coefficients, BLOCK_C=max(16, next_power_of_2(coefficients - 1)),
        HAS_SOFTCAP=softcap is not None,
        HAS_SINK=sink_logits is not None, HAS_LOGITS=with_mass,
        ROOMY=len(key_words) >= config["BLOCK_N"], HIDES=copies is not None, EARLY=early,
        # plain tf32 would lose three digits of an fp32 model
        PRECISION="tf32x3" if query.dtype == single else "tf32", **config, **LAUNCH,
        **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    finish((parts, part_lse, plan.pieces), out, lse, exact, rotated, early)
    if logits is None:
        return out, lse, None
    assert lse is not None  # as mass is asked for
    of_copies = None if copies is None else _mass_of_copies(query, copies, lse, scale, softcap, mass_power)
    mass = query.new_zeros(len(key_words), dtype=single)
    _mass_kernel[(num_segments, cdiv(4 * num_programs, num_segments))](
        mass, logits, lse, positions, since, of_copies, segments.starts, lengths, rows,
        0 if copies is None else copies.positions.shape[1], num_sinks, mass_power,
        BLOCK_M=next_power_of_2(rows), BLOCK_N=64, HIDES=copies is not None, **LAUNCH,
    )  # fmt: skip
    return out, lse if with_lse else None, mass


def _mass_of_copies(
    query: Tensor, copies: ExactCopies, lse: Tensor, scale: float, softcap: float | None, power: float
) -> Tensor:
    """float32 [S, slots], what `_mass_kernel` gives to entries. lse: [B, num_q_heads, n]"""
    batch, num_kv_heads, slots, dim = copies.key.shape
    rows = query.reshape(batch, num_kv_heads, -1, dim)
    logits = (rows @ copies.key.transpose(-1, -2)).float() * scale
    logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
    p = (logits - lse.view(batch, num_kv_heads, -1, 1)).exp() * (copies.positions >= 0)[:, None, None]
    return p.pow(power).sum(2).view(-1, slots)


def plane_block(dim: int, planes: int) -> int:
    """Channels of a plane's tile."""
    return max(16, next_power_of_2(dim // planes))


def halves(scales: Tensor) -> Tensor:
    """float16 [R, 2] as int32 [R, 1]: one load takes both, and is wide enough to be pipelined."""
    return scales.view(torch.int32)
