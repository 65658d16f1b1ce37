"""Triton: `attention/chunk/kernel.py` over codes.

A program owns BLOCK_M rows of a segment, queries of any heads of the group, and walks tiles of entries. Unlike at a
decoding step a tile serves many rows, so that it pays to make whole numbers of its codes, step and zero included: then
a score needs no more than one of 16 bits. They are fp16, or fp32 for an fp32 model, and live as long as the tile. How
codes lie in planes of channels is told in `encoded_attention/kernel.py`; `turn` has brought queries into the range of
fp16, and weights are counted from 2**RANGE down.

What is found is in the basis in which values are encoded, in fp32, and is rotated back. Exact copies and the chunk are
not encoded: they come behind it, in the kernel over 16 bits, which begins with what was found.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpolicy_kernels.attention.chunk.kernel import parts_of, triton_chunk_attention
from kvpolicy_kernels.attention.merge.kernel import merge_parts
from kvpolicy_kernels.attention.plan import default_programs
from kvpolicy_kernels.backend import LAUNCH, interpreted, multiplies_from_shared_memory, on_its_device
from kvpolicy_kernels.base2 import LN2, LOG2E
from kvpolicy_kernels.encoded_attention.kernel import RANGE, halves, plane_block
from kvpolicy_kernels.encoded_attention.numbers.kernel import decoded, fast_exp2
from kvpolicy_kernels.encoded_attention.scores.kernel import centre_frequency, turned_tile
from kvpolicy_kernels.encoded_attention.turn.kernel import CENTRE_SCALE, turned
from kvpolicy_kernels.formats import rotation
from kvpolicy_kernels.key_centre.kernel import wave
from kvpolicy_kernels.segments import Chunk, EncodedSegments, ExactCopies, Segments
from kvpolicy_kernels.softcap.kernel import capped
from kvpolicy_kernels.tiles import cdiv, next_power_of_2

TO_BASE_2, TO_BASE_E = tl.constexpr(LOG2E), tl.constexpr(LN2)
ROWS_AT_ONCE, LEAST_AT_ONCE = 2**15, 128  # queries of all heads, and fewest of each: enough to fill a device, and tiles
COUNTS = ("n", "num_kv_heads", "num_tiles", "num_parts")  # change from call to call and must not compile again


@triton.jit
def _attend_tile(
    acc0, acc1, acc2, acc3, row_max, row_sum, q0, q1, q2, q3, row_scale, q_centre, b_high, b_low, b_frequency,
    b_position, b_kw, b_ks, b_vw, b_vs, seen, softcap_log2, tanh_scale,
    COEFFICIENTS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PLANES: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Planes of queries [BLOCK_M, BLOCK_W], high and low [BLOCK_M, BLOCK_C], and the rest of a row's: see `turned_tile`

    kw, vw: int16 [BLOCK_N, BLOCK_W];  ks, vs: int32 [BLOCK_N], the scales;  position: int32 [BLOCK_N]
    seen: bool [BLOCK_N]

    Without a softcap `q_centre` is left out of the scores: it is the same for all of a row.
    """
    dtype: tl.constexpr = q0.dtype
    # [BLOCK_M, BLOCK_N]
    scores = tl.dot(q0, tl.trans(decoded(b_kw, b_ks, 0, PLANES, PACKED, dtype)), input_precision=PRECISION)
    scores = tl.dot(q1, tl.trans(decoded(b_kw, b_ks, 1, PLANES, PACKED, dtype)), scores, input_precision=PRECISION)
    if PLANES == 4:
        scores = tl.dot(q2, tl.trans(decoded(b_kw, b_ks, 2, PLANES, PACKED, dtype)), scores, input_precision=PRECISION)
        scores = tl.dot(q3, tl.trans(decoded(b_kw, b_ks, 3, PLANES, PACKED, dtype)), scores, input_precision=PRECISION)
    if COEFFICIENTS > 1:
        # [BLOCK_C, BLOCK_N]
        o_c = tl.arange(0, b_frequency.shape[0])
        b_wave = wave(b_position[None, :], b_frequency[:, None], o_c[:, None], PACKED)
        b_wave = (b_wave * CENTRE_SCALE).to(dtype)
        scores = tl.dot(b_low, b_wave, scores, input_precision=PRECISION)
        scores = tl.dot(b_high, b_wave, scores, input_precision=PRECISION)
    bias = tl.where(seen, 0.0, float("-inf"))[None, :]
    if HAS_SOFTCAP:
        scores *= row_scale[:, None]
        if COEFFICIENTS:
            scores += q_centre[:, None]
        scores = capped(scores, softcap_log2, tanh_scale, dtype == tl.float32) + bias
    else:
        scores = scores * row_scale[:, None] + bias
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    # a row that has seen nothing yet keeps -inf; subtracting it would give NaN
    safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    shrink = fast_exp2(row_max - safe_max, PACKED)
    p = fast_exp2(scores - (safe_max - RANGE)[:, None], PACKED)
    row_sum = row_sum * shrink + tl.sum(p, 1)
    p = p.to(dtype)
    shrink = shrink[:, None]
    # [BLOCK_M, BLOCK_WV]
    acc0 = tl.dot(p, decoded(b_vw, b_vs, 0, PLANES, PACKED, dtype), acc0 * shrink, input_precision=PRECISION)
    acc1 = tl.dot(p, decoded(b_vw, b_vs, 1, PLANES, PACKED, dtype), acc1 * shrink, input_precision=PRECISION)
    if PLANES == 4:
        acc2 = tl.dot(p, decoded(b_vw, b_vs, 2, PLANES, PACKED, dtype), acc2 * shrink, input_precision=PRECISION)
        acc3 = tl.dot(p, decoded(b_vw, b_vs, 3, PLANES, PACKED, dtype), acc3 * shrink, input_precision=PRECISION)
    return acc0, acc1, acc2, acc3, new_max, row_sum


@triton.jit(do_not_specialize=COUNTS)
def _attend_codes_kernel(
    q_ptr, sums_ptr, of_centre_ptr, frequency_ptr, kw_ptr, ks_ptr, vw_ptr, vs_ptr, positions_ptr, since_ptr,
    out_ptr, lse_ptr, part_ptr, part_lse_ptr, sink_ptr, starts_ptr, lengths_ptr, order_ptr,
    n, num_kv_heads, num_tiles, num_parts, num_sinks, softcap_log2, tanh_scale,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, KW_ROW: tl.constexpr, KS_ROW: tl.constexpr,
    VW_ROW: tl.constexpr, VS_ROW: tl.constexpr, PLANES: tl.constexpr, PACKED: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_WV: tl.constexpr, STAGES: tl.constexpr,
    COEFFICIENTS: tl.constexpr, BLOCK_C: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SINK: tl.constexpr,
    HIDES: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program a tile of rows, a part of the entries and a segment, as in `_attend_chunk_kernel`.

    q, sums, of_centre, since: see `turn`, whose rows these are;  entries and positions: see `_attend_kernel`
    out: float32 [num_segments, rows, DV];  lse: float32 [num_segments, rows]
    order, part, part_lse: see `_attend_chunk_kernel`;  sink: [num_q_heads]
    HIDES: entries before position `num_sinks` and from `since` on do not count
    """
    W: tl.constexpr = D // PLANES
    WV: tl.constexpr = DV // PLANES
    i_tile = tl.program_id(0) % num_tiles
    i_p = tl.program_id(0) // num_tiles % num_parts
    i_s = tl.load(order_ptr + tl.program_id(0) // num_tiles // num_parts)
    i_h = i_s % num_kv_heads
    length = tl.load(lengths_ptr + i_s).to(tl.int32)
    start = tl.load(starts_ptr + i_s).to(tl.int64)
    num_rows = n * GROUP
    o_m = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    o_w = tl.arange(0, BLOCK_W)
    o_wv = tl.arange(0, BLOCK_WV)
    m_m = o_m < num_rows
    # row r is query r % n of the group's head r // n
    q_rows = i_s * num_rows + o_m
    q0, q1, q2, q3, _, _, row_scale, q_centre, b_high, b_low = turned_tile(
        q_ptr, sums_ptr, of_centre_ptr, q_rows, m_m, D, PLANES, BLOCK_W, COEFFICIENTS, BLOCK_C
    )
    b_frequency = centre_frequency(frequency_ptr, i_h, COEFFICIENTS, BLOCK_C)
    q0, q1, q2, q3 = tl.trans(q0), tl.trans(q1), tl.trans(q2), tl.trans(q3)
    if COEFFICIENTS > 1:
        b_high, b_low = tl.trans(b_high), tl.trans(b_low)
    span = 0
    if HIDES:  # positions between the sinks and the last ones
        span = tl.maximum(tl.load(since_ptr + i_s) - num_sinks, 0).to(tl.uint32)
    acc0 = tl.zeros([BLOCK_M, BLOCK_WV], dtype=tl.float32)
    acc1 = acc0
    acc2 = acc0
    acc3 = acc0
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    beside = tl.zeros([BLOCK_M], dtype=tl.float32)  # what all scores of a row get besides
    if COEFFICIENTS and not HAS_SOFTCAP:
        beside = q_centre
    if HAS_SINK:  # it takes part once, in the first part
        # [BLOCK_M]
        sink = tl.load(sink_ptr + i_h * GROUP + o_m // n, mask=m_m, other=0.0).to(tl.float32)
        row_max = tl.where(i_p == 0, sink * TO_BASE_2 - beside, float("-inf"))
        row_sum += tl.where(i_p == 0, tl.exp2(RANGE), 0.0)
    share = tl.cdiv(tl.cdiv(length, BLOCK_N), num_parts) * BLOCK_N
    begin = tl.minimum(i_p * share, length)
    end = tl.minimum(begin + share, length)
    m_w, m_wv = (o_w < W)[None, :], (o_wv < WV)[None, :]
    for first in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        # [BLOCK_N], behind the last entry its own again
        rows = start + tl.minimum(first + o_n, end - 1)
        seen = o_n < end - first
        # [BLOCK_N, BLOCK_W], [BLOCK_N, BLOCK_WV], and [BLOCK_N] twice
        b_kw = tl.load(kw_ptr + rows[:, None] * KW_ROW + o_w[None, :], mask=m_w, other=0)
        b_vw = tl.load(vw_ptr + rows[:, None] * VW_ROW + o_wv[None, :], mask=m_wv, other=0)
        b_ks = tl.load(ks_ptr + rows * KS_ROW)
        b_vs = tl.load(vs_ptr + rows * VS_ROW)
        b_position = o_n  # not used
        if HIDES or COEFFICIENTS > 1:
            b_position = tl.load(positions_ptr + rows)  # [BLOCK_N]
            if HIDES:
                seen &= (b_position - num_sinks).to(tl.uint32) < span
        acc0, acc1, acc2, acc3, row_max, row_sum = _attend_tile(
            acc0, acc1, acc2, acc3, row_max, row_sum, q0, q1, q2, q3, row_scale, q_centre, b_high, b_low, b_frequency,
            b_position, b_kw, b_ks, b_vw, b_vs, seen, softcap_log2, tanh_scale,
            COEFFICIENTS, HAS_SOFTCAP, PLANES, PACKED, PRECISION,
        )  # fmt: skip
    # a query that has seen nothing gets zeros, and -inf
    safe_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
    b_lse = tl.where(row_sum == 0.0, float("-inf"), row_max + beside - RANGE + tl.log2(safe_sum))
    base = out_ptr
    out_rows = q_rows
    if SPLIT:
        base = part_ptr
        out_rows = (i_s * num_parts + i_p) * num_rows + o_m
        tl.store(part_lse_ptr + out_rows, b_lse, mask=m_m)
    else:
        tl.store(lse_ptr + out_rows, b_lse * TO_BASE_E, mask=m_m)
    ptrs = base + out_rows[:, None] * DV + o_wv[None, :]
    m_out, scale = m_m[:, None] & m_wv, (1.0 / safe_sum)[:, None]
    tl.store(ptrs, acc0 * scale, mask=m_out)
    tl.store(ptrs + WV, acc1 * scale, mask=m_out)
    if PLANES == 4:
        tl.store(ptrs + 2 * WV, acc2 * scale, mask=m_out)
        tl.store(ptrs + 3 * WV, acc3 * scale, mask=m_out)


def launch_config(dtype: torch.dtype, dim: int, rows: int, hopper: bool) -> dict[str, int]:
    """Tile sizes and launch options. Arguments as of the `launch_config` of 16 bits, whose reasons are these, too."""
    if dtype == torch.float32:
        return {"BLOCK_M": 16 if dim > 128 else 32, "BLOCK_N": 16, "STAGES": 2, "num_warps": 4}
    if dim > 128:
        return {"BLOCK_M": 64, "BLOCK_N": 32 if hopper else 16, "STAGES": 2, "num_warps": 8}
    if rows <= 64:
        return {"BLOCK_M": 64, "BLOCK_N": 32, "STAGES": 3, "num_warps": 4}
    return {"BLOCK_M": 128, "BLOCK_N": 64 if hopper or dim <= 64 else 32, "STAGES": 3, "num_warps": 8}


@on_its_device
def triton_encoded_chunk_attention(
    query: Tensor,
    segments: EncodedSegments,
    chunk: Chunk | None,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    copies: ExactCopies | None = None,
) -> Tensor:
    """Shapes as in `encoded_attention`."""
    segments = segments.on(query.device)
    (batch, num_q_heads, n), entry_format = query.shape[:3], segments.entry_format
    value_dim = segments.values.codes.shape[1] * entry_format.codes_in_word
    exact = _no_entries(query, len(segments), value_dim) if copies is None else copies.held()
    back = rotation(value_dim, query.device).T if entry_format.rotated else None
    out, at_once = query.new_empty(batch, num_q_heads, n, value_dim), queries_at_once(batch * num_q_heads)
    for first in range(0, n, at_once):
        part = slice(first, min(first + at_once, n))
        own, arriving = query[:, :, part], None if chunk is None else chunk.of_queries(part, n)
        mid, lse = _over_codes(own, segments, value_dim, scale, softcap, sink_logits, copies)
        mid = mid if back is None else mid @ back
        if arriving is not None or copies is not None:
            mid = triton_chunk_attention(own, exact, arriving, scale, softcap, found=(mid, lse))
        out[:, :, part] = mid
    return out


def queries_at_once(heads: int) -> int:
    """Queries of a pass over the entries: what they take beside the result is 42 MB at head dim 128.

    heads: query heads of all sequences
    """
    return max(LEAST_AT_ONCE, ROWS_AT_ONCE // heads)


def _over_codes(
    query: Tensor,
    segments: EncodedSegments,
    value_dim: int,
    scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
    copies: ExactCopies | None,
) -> tuple[Tensor, Tensor]:
    """What entries without copies give, as values are encoded: float32 [B, num_q_heads, n, Dv], and its log-sum-exps"""
    (key_words, key_scales), (value_words, value_scales) = segments.keys, segments.values
    entry_format, lengths, centre = segments.entry_format, segments.lengths, segments.key_centre
    batch, num_q_heads, n, dim = query.shape
    num_segments, planes, single = len(segments), entry_format.codes_in_word, torch.float32
    num_kv_heads = num_segments // batch
    group, coefficients = num_q_heads // num_kv_heads, 0 if centre is None else len(centre.coefficients)
    rows = group * n
    out = query.new_empty(batch, num_q_heads, n, value_dim, dtype=single)
    lse = query.new_empty(batch, num_q_heads, n, dtype=single)
    query, packed = query if query.stride(-1) == 1 else query.contiguous(), query.dtype != single and not interpreted()
    turned_query, sums, of_centre, since = turned(
        query, num_kv_heads, planes, scale * LOG2E, rotated=entry_format.rotated, packed=packed,
        centre=centre, copies=copies,
    )  # fmt: skip
    hopper = multiplies_from_shared_memory(query.device)
    config = launch_config(query.dtype, max(dim, value_dim), rows, hopper)
    num_tiles = cdiv(rows, config["BLOCK_M"])
    programs = num_tiles * num_segments
    num_parts = parts_of(programs, len(key_words) // num_segments, 2 * default_programs(query.device))
    part, part_lse = None, None
    if num_parts > 1:
        part = query.new_empty(num_segments * num_parts, rows, value_dim, dtype=single)
        part_lse = query.new_empty(num_segments * num_parts, rows, dtype=single)
    _attend_codes_kernel[(programs * num_parts,)](
        turned_query, sums, of_centre, None if centre is None else centre.frequencies, key_words, halves(key_scales),
        value_words, halves(value_scales), segments.positions, since, out, lse, part, part_lse, sink_logits,
        segments.starts, lengths, lengths.argsort(descending=True),
        n, num_kv_heads, num_tiles, num_parts, 0 if copies is None else copies.num_sinks,
        (softcap or 0.0) * LOG2E, 2.0 / (softcap or 1.0),
        GROUP=group, D=dim, DV=value_dim, KW_ROW=key_words.stride(0), KS_ROW=key_scales.stride(0) // 2,
        VW_ROW=value_words.stride(0), VS_ROW=value_scales.stride(0) // 2, PLANES=planes, PACKED=packed,
        BLOCK_W=plane_block(dim, planes), BLOCK_WV=plane_block(value_dim, planes),
        COEFFICIENTS=coefficients, BLOCK_C=max(16, next_power_of_2(coefficients - 1)),
        HAS_SOFTCAP=softcap is not None, HAS_SINK=sink_logits is not None, HIDES=copies is not None,
        SPLIT=num_parts > 1,
        # plain tf32 would lose three digits of an fp32 model
        PRECISION="tf32x3" if query.dtype == single else "tf32", **config, **LAUNCH,
    )  # fmt: skip
    if part is not None and part_lse is not None:
        merge_parts(out, lse, part, part_lse, num_segments)
    return out, lse


def _no_entries(query: Tensor, count: int, value_dim: int) -> Segments:
    keys, values = query.new_empty(0, query.shape[3]), query.new_empty(0, value_dim)
    table = torch.zeros(count, dtype=torch.int64, device=query.device)
    return Segments(keys, values, table, table)
