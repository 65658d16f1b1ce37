"""Triton: flash attention of any number of queries, first over a segment's entries, then over the chunk.

A segment has `n * group` rows: row r is query `r // group` of the group's head `r % group`. One program takes BLOCK_M
of them, so that a tile of keys serves every head of the group. It reads as much as a tile of one head's queries would,
and does as many products, but the queries of a tile are `group` times fewer: less of the causal diagonal is computed
for nothing, and a turn of 40 tokens fills its tiles. Programs of one segment are neighbours, and find its entries in
the L2 cache; the longest segment comes first, and in each the last queries, which see most of the chunk.

Where there are too few rows for the device, each segment's entries are cut into parts, which a second launch merges.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpolicy_kernels.attention.merge.kernel import merge_parts
from kvpolicy_kernels.attention.plan import default_programs
from kvpolicy_kernels.backend import LAUNCH, multiplies_from_shared_memory, on_its_device
from kvpolicy_kernels.base2 import LOG2E
from kvpolicy_kernels.segments import Chunk, Segments
from kvpolicy_kernels.softcap.kernel import capped
from kvpolicy_kernels.tiles import cdiv, next_power_of_2

TO_BASE_2 = tl.constexpr(LOG2E)
NO_BOUND = tl.constexpr(2**30)  # more than there are tokens
COUNTS = ("n", "m", "num_kv_heads", "num_tiles", "num_parts")  # change from call to call and must not compile again
SHORTEST_PART = 512  # entries; a part reads its queries and writes its sums, which shorter ones would not be worth
MOST_PARTS = 64


@triton.jit
def _attend_tile(
    acc, row_max, row_sum, b_q, b_k, b_v, visible, scale_log2, softcap_log2, tanh_scale,
    MASKED: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # [BLOCK_M, BLOCK_N]
    scores = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    if HAS_SOFTCAP:
        scores = capped(scores * scale_log2, softcap_log2, tanh_scale, b_q.dtype == tl.float32)
        scale_log2 = 1.0
    if MASKED:
        scores = tl.where(visible, scores * scale_log2, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        # a row that has seen nothing yet keeps -inf; subtracting it would give NaN
        safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = tl.exp2(scores - safe_max[:, None])
    else:  # the scale is never negative, so the largest product is the largest score: one multiply-add for each
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
        safe_max = new_max
        p = tl.exp2(scores * scale_log2 - new_max[:, None])
    shrink = tl.exp2(row_max - safe_max)
    acc = acc * shrink[:, None] + tl.dot(p.to(b_v.dtype), b_v, input_precision=PRECISION)
    return acc, new_max, row_sum * shrink + tl.sum(p, 1)


@triton.jit
def _attend_rows(
    acc, row_max, row_sum, b_q, k_base, v_base, mask_base, mask_rows, k_row, v_row, begin, whole, end, last_seen,
    scale_log2, softcap_log2, tanh_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    STAGES: tl.constexpr, HAS_MASK: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Columns from `begin` to `whole`, full tiles that every row sees, and from there to `end` under masks.

    k_base, v_base: of column 0, whose rows are k_row and v_row apart
    mask_base: of column 0;  mask_rows: [BLOCK_M], how far behind it a row's mask begins
    last_seen: [BLOCK_M], the last column that a row sees where there is no mask
    """
    o_n = tl.arange(0, BLOCK_N)
    o_row = o_n[:, None].to(tl.int64)
    m_d = (tl.arange(0, BLOCK_D) < D)[None, :]
    m_dv = (tl.arange(0, BLOCK_DV) < DV)[None, :]
    o_d = tl.arange(0, BLOCK_D)[None, :]
    o_dv = tl.arange(0, BLOCK_DV)[None, :]
    for first in tl.range(begin, whole, BLOCK_N, num_stages=STAGES):
        k_ptrs = k_base + tl.cast(first, tl.int64) * k_row + (o_row * k_row + o_d)
        v_ptrs = v_base + tl.cast(first, tl.int64) * v_row + (o_row * v_row + o_dv)
        # [BLOCK_N, BLOCK_D] and [BLOCK_N, BLOCK_DV]; all rows of a full tile are there
        b_k = tl.load(k_ptrs) if D == BLOCK_D else tl.load(k_ptrs, mask=m_d, other=0.0)
        b_v = tl.load(v_ptrs) if DV == BLOCK_DV else tl.load(v_ptrs, mask=m_dv, other=0.0)
        acc, row_max, row_sum = _attend_tile(
            acc, row_max, row_sum, b_q, b_k, b_v, m_d, scale_log2, softcap_log2, tanh_scale,
            False, HAS_SOFTCAP, PRECISION,
        )  # fmt: skip
    for first in tl.range(whole, end, BLOCK_N, num_stages=STAGES):
        o_j = first + o_n
        m_n = o_j < end
        k_ptrs = k_base + tl.cast(first, tl.int64) * k_row + (o_row * k_row + o_d)
        v_ptrs = v_base + tl.cast(first, tl.int64) * v_row + (o_row * v_row + o_dv)
        # [BLOCK_N, BLOCK_D] and [BLOCK_N, BLOCK_DV]; what lies behind a segment may be NaN
        b_k = tl.load(k_ptrs, mask=m_n[:, None] & m_d, other=0.0)
        b_v = tl.load(v_ptrs, mask=m_n[:, None] & m_dv, other=0.0)
        if HAS_MASK:
            # [BLOCK_M, BLOCK_N]
            visible = tl.load(mask_base + first + (mask_rows[:, None] + o_n[None, :]), mask=m_n[None, :], other=0) != 0
        else:
            visible = m_n[None, :] & (o_j[None, :] <= last_seen[:, None])
        acc, row_max, row_sum = _attend_tile(
            acc, row_max, row_sum, b_q, b_k, b_v, visible, scale_log2, softcap_log2, tanh_scale,
            True, HAS_SOFTCAP, PRECISION,
        )  # fmt: skip
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=COUNTS)
def _attend_chunk_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, part_ptr, part_lse_ptr, sink_ptr, chunk_k_ptr, chunk_v_ptr, chunk_mask_ptr,
    entry_mask_ptr, mask_starts_ptr, found_ptr, found_lse_ptr, starts_ptr, lengths_ptr, order_ptr,
    stride_qb, stride_qh, stride_qn, stride_ckb, stride_ckh, stride_ckm, stride_cvb, stride_cvh, stride_cvm,
    stride_mb, stride_mn, num_kv_heads, n, m, num_tiles, num_parts, scale_log2, softcap_log2, tanh_scale,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    STAGES: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SINK: tl.constexpr, HAS_CHUNK: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_ENTRY_MASK: tl.constexpr, HAS_FOUND: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program a tile of rows, a part of the entries and a segment, in this order. The chunk is the last part's.

    A pointer to what is absent is None. SPLIT: there are several parts, which go to `part` and `part_lse` (base 2).

    q:      [B, num_q_heads, n, D];  out: [B, num_q_heads, n, DV];  sink: [num_q_heads]
    k:      [R, D], rows K_ROW elements apart;  v: [R, DV], V_ROW apart;  starts, lengths: int64 [num_segments]
    order:  int64 [num_segments], the segments in the order in which they begin
    part:   float32 [num_segments, num_parts, group * n, DV];  part_lse: the same without DV; in the order of `out`
    chunk_k: [B, num_kv_heads, m, D];  chunk_v: [B, num_kv_heads, m, DV];  chunk_mask: uint8 [B or 1, 1, n, m]
    entry_mask: uint8, [n, length] of each segment from mask_starts on;  mask_starts: int64 [num_segments]
    found:  float32, as `out`, what rows begin with;  found_lse: float32 [B, num_q_heads, n], its log-sum-exps
    scale_log2, softcap_log2: times log2(e), and the scale not negative;  tanh_scale: 2 / softcap
    """
    i_tile = num_tiles - 1 - tl.program_id(0) % num_tiles
    i_p = tl.program_id(0) // num_tiles % num_parts
    i_s = tl.load(order_ptr + tl.program_id(0) // num_tiles // num_parts)
    i_b = i_s // num_kv_heads
    i_h = i_s % num_kv_heads
    length = tl.load(lengths_ptr + i_s).to(tl.int32)
    start = tl.load(starts_ptr + i_s).to(tl.int64)
    num_rows = n * GROUP
    o_m = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    o_q = o_m // GROUP
    o_g = (o_m % GROUP).to(tl.int64)
    m_m = o_m < num_rows
    # [BLOCK_M, BLOCK_D]
    b_q = tl.load(
        q_ptr + i_b * stride_qb + ((i_h * GROUP + o_g) * stride_qh + o_q.to(tl.int64) * stride_qn)[:, None]
        + o_d[None, :],
        mask=m_m[:, None] & (o_d < D)[None, :],
        other=0.0,
    )  # fmt: skip
    acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    if HAS_SINK:  # it takes part once, in the first part
        # [BLOCK_M]
        sink = tl.load(sink_ptr + i_h * GROUP + o_g, mask=m_m, other=0.0).to(tl.float32)
        row_max = tl.where(i_p == 0, sink * TO_BASE_2, float("-inf"))
        row_sum += tl.where(i_p == 0, 1.0, 0.0)
    if HAS_FOUND:  # likewise
        # [BLOCK_M] and [BLOCK_M, BLOCK_DV]
        found_rows = i_s * num_rows + o_g * n + o_q
        m_found = m_m & (i_p == 0)
        row_max = tl.load(found_lse_ptr + found_rows, mask=m_found, other=float("-inf")) * TO_BASE_2
        row_sum = tl.where(row_max == float("-inf"), 0.0, 1.0)
        m_found = m_found[:, None] & (o_dv < DV)[None, :]
        acc = tl.load(found_ptr + found_rows[:, None] * DV + o_dv[None, :], mask=m_found, other=0.0)
    share = tl.cdiv(tl.cdiv(length, BLOCK_N), num_parts) * BLOCK_N
    begin = tl.minimum(i_p * share, length)
    end = tl.minimum(begin + share, length)
    whole = begin if HAS_ENTRY_MASK else begin + (end - begin) // BLOCK_N * BLOCK_N
    first = i_tile * BLOCK_M // GROUP
    # [BLOCK_M], rows of a mask from the tile's first query on, few enough for int32; behind the last query its own
    o_seen = tl.minimum(o_q, n - 1) - first
    mask_base = q_ptr  # not used
    if HAS_ENTRY_MASK:
        mask_base = entry_mask_ptr + tl.load(mask_starts_ptr + i_s) + first.to(tl.int64) * length
    acc, row_max, row_sum = _attend_rows(
        acc, row_max, row_sum, b_q,
        k_ptr + start * K_ROW, v_ptr + start * V_ROW, mask_base, o_seen * length, K_ROW, V_ROW,
        begin, whole, end, o_q + NO_BOUND, scale_log2, softcap_log2, tanh_scale,
        D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, STAGES, HAS_ENTRY_MASK, HAS_SOFTCAP, PRECISION,
    )  # fmt: skip
    if HAS_CHUNK:
        # query q sees the tokens up to q + m - n; of the tile, the first query sees fewest and the last sees most
        last = (tl.minimum(i_tile * BLOCK_M + BLOCK_M, num_rows) - 1) // GROUP
        whole = tl.minimum(tl.maximum(first + m - n + 1, 0), m) // BLOCK_N * BLOCK_N
        end = tl.minimum(tl.maximum(last + m - n + 1, 0), m)
        if HAS_MASK:
            whole, end = 0, m
            mask_base = chunk_mask_ptr + i_b * stride_mb + first.to(tl.int64) * stride_mn
        is_last = i_p == num_parts - 1
        acc, row_max, row_sum = _attend_rows(
            acc, row_max, row_sum, b_q,
            chunk_k_ptr + i_b * stride_ckb + i_h * stride_ckh, chunk_v_ptr + i_b * stride_cvb + i_h * stride_cvh,
            mask_base, o_seen * stride_mn, stride_ckm, stride_cvm, 0, tl.where(is_last, whole, 0),
            tl.where(is_last, end, 0), o_q + (m - n), scale_log2, softcap_log2, tanh_scale,
            D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, STAGES, HAS_MASK, HAS_SOFTCAP, PRECISION,
        )  # fmt: skip
    # a query that has seen nothing gets zeros
    safe_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
    b_out = acc / safe_sum[:, None]
    m_out = m_m[:, None] & (o_dv < DV)[None, :]
    # int64 from i_s and o_g on; in the order of heads, then queries
    rows = (i_s * num_parts + i_p) * num_rows + o_g * n + o_q
    if SPLIT:
        tl.store(part_ptr + rows[:, None] * DV + o_dv[None, :], b_out, mask=m_out)
        b_lse = tl.where(row_sum == 0.0, float("-inf"), row_max + tl.log2(safe_sum))
        tl.store(part_lse_ptr + rows, b_lse, mask=m_m)
    else:
        tl.store(out_ptr + rows[:, None] * DV + o_dv[None, :], b_out.to(out_ptr.dtype.element_ty), mask=m_out)


def launch_config(dtype: torch.dtype, dim: int, rows: int, masked: bool, hopper: bool) -> dict[str, int]:
    """Tile sizes and launch options.

    dim: the larger of D and Dv;  rows: of a segment;  masked: the chunk or the entries have a mask
    hopper: tensor cores take tiles from shared memory, of which there are 227 KB

    16-bit tiles are the largest that compile without a spill on sm_80 and sm_90, and fit the 99 KB of sm_86 where they
    are not Hopper's. fp32 products in three tf32 passes need registers for the split operands, and spill. Tiles of
    masks take registers too.
    """
    if dtype == torch.float32:
        tile, warps, stages = 16 if dim > 128 else 32, 8 if 64 < dim <= 128 else 4, 2
        block_m, block_n = tile, tile
    elif masked or dim > 128:
        block_m, block_n, stages, warps = 64, 16 if masked and dim > 128 else 32, 2, 8
    elif rows <= 64:
        block_m, block_n, stages, warps = 64, 32, 3, 4
    else:
        block_m, block_n, stages, warps = 128, 64 if hopper or dim <= 64 else 32, 3, 8
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "STAGES": stages, "num_warps": warps}


def parts_of(programs: int, entries: int, wanted: int) -> int:
    """Parts that the entries of every segment are cut into.

    programs: without a cut;  entries: of a segment, roughly;  wanted: programs that keep the device busy
    """
    return max(1, min(wanted // programs, entries // SHORTEST_PART, MOST_PARTS))


@on_its_device
def triton_chunk_attention(
    query: Tensor,
    segments: Segments,
    chunk: Chunk | None,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    entry_mask: Sequence[Tensor] | None = None,
    found: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Shapes as in `ragged_attention`.

    found: attention over other entries, float32 [B, num_q_heads, n, Dv], contiguous, and float32 [B, num_q_heads, n],
        its log-sum-exps; the sinks are in it
    """
    segments = segments.on(query.device)
    keys, values, lengths = segments.keys, segments.values, segments.lengths
    batch, num_q_heads, n, dim = query.shape
    num_segments, value_dim = len(segments), values.shape[1]
    num_kv_heads = num_segments // batch
    rows = num_q_heads // num_kv_heads * n
    out = query.new_empty(batch, num_q_heads, n, value_dim)
    if rows == 0:
        return out
    if scale < 0:  # the kernel takes the largest product for the largest score
        query, scale = -query, -scale
    chunk_key, chunk_value, mask = (None,) * 3 if chunk is None else (chunk.key, chunk.value, chunk.mask)
    query, chunk_key, chunk_value = (
        x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (query, chunk_key, chunk_value)
    )
    mask = None if mask is None else mask.contiguous().view(torch.uint8)
    seen, seen_starts = None, None
    if entry_mask is not None:  # the masks behind one another
        seen = torch.cat([entries.reshape(-1) for entries in entry_mask]).view(torch.uint8)
        seen_starts = (lengths.cumsum(0) - lengths) * n
    masked = mask is not None or entry_mask is not None
    hopper = multiplies_from_shared_memory(query.device)
    config = launch_config(query.dtype, max(dim, value_dim), rows, masked, hopper)
    num_tiles = cdiv(rows, config["BLOCK_M"])
    programs = num_tiles * num_segments
    num_parts = parts_of(programs, len(keys) // num_segments, 2 * default_programs(query.device))
    part, part_lse = None, None
    if num_parts > 1:
        part = query.new_empty(num_segments * num_parts, rows, value_dim, dtype=torch.float32)
        part_lse = query.new_empty(num_segments * num_parts, rows, dtype=torch.float32)
    _attend_chunk_kernel[(programs * num_parts,)](
        query, keys, values, out, part, part_lse, sink_logits, chunk_key, chunk_value, mask, seen, seen_starts,
        *(found or (None, None)), segments.starts, lengths, lengths.argsort(descending=True),
        *query.stride()[:3], *_strides(chunk_key), *_strides(chunk_value),
        0 if mask is None or len(mask) == 1 else mask.stride(0), 0 if mask is None else mask.stride(2),
        num_kv_heads, n, 0 if chunk is None else len(chunk), num_tiles, num_parts,
        scale * LOG2E, (softcap or 0.0) * LOG2E, 2.0 / (softcap or 1.0),
        GROUP=num_q_heads // num_kv_heads, D=dim, DV=value_dim, K_ROW=keys.stride(0), V_ROW=values.stride(0),
        BLOCK_D=max(16, next_power_of_2(dim)), BLOCK_DV=max(16, next_power_of_2(value_dim)),
        HAS_SOFTCAP=softcap is not None, HAS_SINK=sink_logits is not None, HAS_CHUNK=chunk is not None,
        HAS_MASK=mask is not None, HAS_ENTRY_MASK=entry_mask is not None, HAS_FOUND=found is not None,
        SPLIT=num_parts > 1,
        # plain tf32 would lose three digits of an fp32 model
        PRECISION="tf32x3" if query.dtype == torch.float32 else "tf32", **config, **LAUNCH,
    )  # fmt: skip
    if part is not None and part_lse is not None:
        merge_parts(out, None, part, part_lse, num_segments)
    return out


def _strides(chunk: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if chunk is None else chunk.stride()[:3]
