"""Triton: split-K over segments, one program a fixed share of all entries, and a second kernel that merges the shares.

The queries of a group are the rows of one tile, so that an entry is read once. See `plan.py` for who reads what.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpolicy_kernels.attention.merge.kernel import merge_pieces
from kvpolicy_kernels.attention.plan import WorkPlan, default_programs, unit_of
from kvpolicy_kernels.attention.tile.kernel import attend_chunk, attend_tile
from kvpolicy_kernels.backend import LAUNCH, at_least_hopper, on_its_device
from kvpolicy_kernels.base2 import LN2, LOG2E
from kvpolicy_kernels.segments import BlockSegments, Chunk, Segments
from kvpolicy_kernels.tiles import cdiv, next_power_of_2

TO_BASE_2, TO_BASE_E = tl.constexpr(LOG2E), tl.constexpr(LN2)


@triton.jit(do_not_specialize=("num_segments",))  # any number of requests comes, and a compilation holds all of them up
def _plan_kernel(
    lengths_ptr, units_ptr, quantum_ptr, programs_ptr, pieces_ptr, num_segments, num_programs,
    UNIT: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Every program scans all lengths of its layer, and answers for BLOCK_C programs and as many segments."""
    i_l = tl.program_id(1).to(tl.int64)
    lengths_ptr += i_l * num_segments
    total = tl.zeros([], dtype=tl.int32)
    for first in range(0, num_segments, BLOCK_S):
        o_s = first + tl.arange(0, BLOCK_S)
        # [BLOCK_S]
        b_length = tl.load(lengths_ptr + o_s, mask=o_s < num_segments, other=0).to(tl.int32)
        total += tl.sum(tl.where(o_s < num_segments, tl.cdiv(b_length, UNIT) + 1, 0))
    quantum = tl.cdiv(total, num_programs)
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    target = o_c * quantum
    segment = tl.zeros([BLOCK_C], dtype=tl.int32)  # segments that end at or before the target
    ended = tl.zeros([BLOCK_C], dtype=tl.int32)  # their units
    before = tl.zeros([BLOCK_C], dtype=tl.int32)  # units before segment o_c
    own = tl.zeros([BLOCK_C], dtype=tl.int32)  # units of segment o_c
    passed = tl.zeros([], dtype=tl.int32)
    for first in range(0, num_segments, BLOCK_S):
        o_s = first + tl.arange(0, BLOCK_S)
        # [BLOCK_S]
        b_length = tl.load(lengths_ptr + o_s, mask=o_s < num_segments, other=0).to(tl.int32)
        units = tl.where(o_s < num_segments, tl.cdiv(b_length, UNIT) + 1, 0)
        end = passed + tl.cumsum(units, 0)
        m_ended = (end[None, :] <= target[:, None]) & (o_s < num_segments)[None, :]
        segment += tl.sum(m_ended.to(tl.int32), 1)
        ended += tl.sum(tl.where(m_ended, units[None, :], 0), 1)
        before += tl.sum(tl.where(o_s[None, :] < o_c[:, None], units[None, :], 0), 1)
        own += tl.sum(tl.where(o_s[None, :] == o_c[:, None], units[None, :], 0), 1)
        passed += tl.sum(units)
    m_c = o_c < num_programs
    tl.store(programs_ptr + (i_l * num_programs + o_c) * 2, segment, mask=m_c)
    tl.store(programs_ptr + (i_l * num_programs + o_c) * 2 + 1, target - ended, mask=m_c)
    m_s = o_c < num_segments
    begin = before // quantum
    tl.store(units_ptr + i_l * num_segments + o_c, own, mask=m_s)
    tl.store(pieces_ptr + (i_l * num_segments + o_c) * 2, begin + o_c, mask=m_s)
    tl.store(pieces_ptr + (i_l * num_segments + o_c) * 2 + 1, (before + own - 1) // quantum - begin + 1, mask=m_s)
    if tl.program_id(0) == 0:
        tl.store(quantum_ptr + i_l, quantum)


@on_its_device
def triton_plan(lengths: Tensor, num_programs: int, unit: int) -> WorkPlan:
    """Arguments as in `plan_work`. unit: entries."""
    lengths = lengths.contiguous()
    shape, num_segments = lengths.shape[:-1], lengths.shape[-1]
    table = torch.empty(
        lengths.numel() * 3 + shape.numel() * (2 * num_programs + 1), dtype=torch.int32, device=lengths.device
    )
    sizes = [(*shape, num_segments), shape, (*shape, num_programs, 2), (*shape, num_segments, 2)]
    parts = table.split([torch.Size(size).numel() for size in sizes])
    plan = WorkPlan(*(part.view(size) for part, size in zip(parts, sizes, strict=True)), unit)
    block = 16
    grid = (cdiv(max(num_programs, num_segments), block), shape.numel())
    _plan_kernel[grid](
        lengths, plan.units, plan.quantum, plan.programs, plan.pieces, num_segments, num_programs,
        UNIT=unit, BLOCK_S=max(16, min(1024, next_power_of_2(num_segments))), BLOCK_C=block, **LAUNCH,
    )  # fmt: skip
    return plan


@triton.jit(do_not_specialize=("stride_blocks", "rows_per_block"))
def _attend_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, part_ptr, part_lse_ptr, logits_ptr, sink_ptr,
    chunk_k_ptr, chunk_v_ptr, chunk_mask_ptr, starts_ptr, lengths_ptr, units_ptr, quantum_ptr, programs_ptr,
    blocks_ptr, offsets_ptr, sizes_ptr,
    stride_qb, stride_qh, stride_qn, stride_ckb, stride_ckh, stride_ckm, stride_cvb, stride_cvh, stride_cvm,
    stride_mb, stride_mn, stride_blocks, rows_per_block,
    num_segments, num_kv_heads, group, n, m, scale_log2, softcap_log2, tanh_scale,
    D: tl.constexpr, DV: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    STAGES: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SINK: tl.constexpr, HAS_CHUNK: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_LOGITS: tl.constexpr, HAS_LSE: tl.constexpr, HAS_BLOCKS: tl.constexpr,
    EARLY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (i_m, i_c) takes BLOCK_M of the queries through the segments that the plan gives to its program i_c.

    A segment has `group * n` query rows: row r is query `r % n` of the group's head `r // n`. What a program finds for
    a whole segment it stores in `out` and `lse`, what it finds for a piece of one in `part` and `part_lse`, for the
    merge. Scores and `part_lse` are in base 2, `lse` is not. A pointer to what is absent is None.

    q:      [B, num_q_heads, n, D];  out: [B, num_q_heads, n, DV];  lse: float32 [B, num_q_heads, n]
    k:      [R, D], rows K_ROW elements apart;  v: [R, DV], V_ROW apart;  starts, lengths: int64 [num_segments]
    part:   float32 [num_pieces, group * n, DV];  part_lse: float32 [num_pieces, group * n]
    logits: float32 [R, group * n], the scores, where the mass of entries is asked for;  sink: [num_q_heads]
    chunk_k: [B, num_kv_heads, m, D];  chunk_v: [B, num_kv_heads, m, DV];  chunk_mask: uint8 [B or 1, 1, n, m]
    units, quantum, programs: a `WorkPlan` of one layer, and UNIT its unit
    blocks: int [B, P], rows stride_blocks apart, offsets, sizes: int64 [num_kv_heads], and rows_per_block, as
        `BlockSegments` has them, where entries are in blocks; starts and logits are absent then
    scale_log2, softcap_log2: times log2(e);  tanh_scale: 2 / softcap
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    i_c = tl.program_id(1)
    i_s = tl.load(programs_ptr + i_c * 2)
    unit = tl.load(programs_ptr + i_c * 2 + 1)
    left = tl.load(quantum_ptr)
    num_rows = group * n
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    m_m = o_m < num_rows
    while (left > 0) & (i_s < num_segments):
        units = tl.load(units_ptr + i_s)
        length = tl.load(lengths_ptr + i_s).to(tl.int32)
        start = 0 if HAS_BLOCKS else tl.load(starts_ptr + i_s).to(tl.int64)
        i_b = (i_s // num_kv_heads).to(tl.int64)
        i_h = (i_s % num_kv_heads).to(tl.int64)
        # [BLOCK_M, BLOCK_D]; row r is query r % n of the group's head r // n
        b_q = tl.load(
            q_ptr + i_b * stride_qb + (i_h * group + o_m // n)[:, None] * stride_qh + (o_m % n)[:, None] * stride_qn
            + o_d[None, :],
            mask=m_m[:, None] & (o_d < D)[None, :],
            other=0.0,
        )  # fmt: skip
        take = tl.minimum(left, units - unit)
        is_last = unit + take == units
        # the first unit of a segment stands for the cost of beginning it
        begin = tl.minimum(tl.maximum(unit - 1, 0) * UNIT, length)
        end = tl.minimum(tl.maximum(unit + take - 1, 0) * UNIT, length)
        end = tl.where(is_last, length, end)
        full = begin + (end - begin) // BLOCK_N * BLOCK_N
        if HAS_BLOCKS:
            own_blocks_ptr = blocks_ptr + i_b * stride_blocks
            size = tl.load(sizes_ptr + i_h).to(tl.int32)
            offset = tl.load(offsets_ptr + i_h).to(tl.int64)
            # [BLOCK_N], which of the sequence's blocks each entry of a tile is in, and which entry of the block it is;
            # counted on from tile to tile, because every thread would divide for each of its rows
            i_block, inside = (begin + o_n) // size, (begin + o_n) % size
            more_blocks, more_inside = BLOCK_N // size, BLOCK_N % size
            # read a tile ahead: rows that waited for it would be fetched when they are needed already
            block = tl.load(own_blocks_ptr + i_block, mask=begin + o_n < end, other=0).to(tl.int32)
            k_base, v_base = k_ptr + offset * K_ROW + o_d[None, :], v_ptr + offset * V_ROW + o_dv[None, :]
        acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
        row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
        if HAS_SINK:  # it takes part once, in the first piece of a segment
            # [BLOCK_M]
            sink = tl.load(sink_ptr + i_h * group + o_m // n, mask=m_m, other=0.0).to(tl.float32)
            row_max = tl.where(unit == 0, sink * TO_BASE_2, float("-inf"))
            row_sum += tl.where(unit == 0, 1.0, 0.0)
        k_ptrs = k_ptr + (start + begin) * K_ROW + o_n[:, None] * K_ROW + o_d[None, :]
        v_ptrs = v_ptr + (start + begin) * V_ROW + o_n[:, None] * V_ROW + o_dv[None, :]
        logits_ptrs = k_ptrs  # not used
        if HAS_LOGITS:
            logits_ptrs = logits_ptr + (start + begin) * num_rows + o_n[None, :] * num_rows + o_m[:, None]
        for first in tl.range(begin, full, BLOCK_N, num_stages=STAGES):
            if HAS_BLOCKS:
                rows = (block * rows_per_block + inside)[:, None].to(tl.int64)
                k_ptrs, v_ptrs = k_base + rows * K_ROW, v_base + rows * V_ROW
                inside += more_inside
                i_block += more_blocks + (inside >= size).to(tl.int32)
                inside = tl.where(inside >= size, inside - size, inside)
                m_next = first + BLOCK_N + o_n < end
                block = tl.load(own_blocks_ptr + i_block, mask=m_next, other=0).to(tl.int32)
            # [BLOCK_N, BLOCK_D] and [BLOCK_N, BLOCK_DV]; all rows of a full tile are entries
            b_k = tl.load(k_ptrs) if D == BLOCK_D else tl.load(k_ptrs, mask=(o_d < D)[None, :], other=0.0)
            b_v = tl.load(v_ptrs) if DV == BLOCK_DV else tl.load(v_ptrs, mask=(o_dv < DV)[None, :], other=0.0)
            acc, row_max, row_sum = attend_tile(
                acc, row_max, row_sum, b_q, b_k, b_v, m_m[:, None], scale_log2, softcap_log2, tanh_scale,
                logits_ptrs, m_m[:, None], False, HAS_SOFTCAP, HAS_LOGITS, PRECISION,
            )  # fmt: skip
            if not HAS_BLOCKS:
                k_ptrs += BLOCK_N * K_ROW
                v_ptrs += BLOCK_N * V_ROW
            if HAS_LOGITS:
                logits_ptrs += BLOCK_N * num_rows
        if full < end:
            m_n = full + o_n < end
            if HAS_BLOCKS:
                rows = (block * rows_per_block + inside)[:, None].to(tl.int64)
                k_ptrs, v_ptrs = k_base + rows * K_ROW, v_base + rows * V_ROW
            # [BLOCK_N, BLOCK_D] and [BLOCK_N, BLOCK_DV]; what lies behind the segment may be NaN
            b_k = tl.load(k_ptrs, mask=m_n[:, None] & (o_d < D)[None, :], other=0.0)
            b_v = tl.load(v_ptrs, mask=m_n[:, None] & (o_dv < DV)[None, :], other=0.0)
            acc, row_max, row_sum = attend_tile(
                acc, row_max, row_sum, b_q, b_k, b_v, m_n[None, :], scale_log2, softcap_log2, tanh_scale,
                logits_ptrs, m_m[:, None] & m_n[None, :], True, HAS_SOFTCAP, HAS_LOGITS, PRECISION,
            )  # fmt: skip
        if HAS_CHUNK:
            acc, row_max, row_sum = attend_chunk(
                acc, row_max, row_sum, b_q, chunk_k_ptr + i_b * stride_ckb + i_h * stride_ckh,
                chunk_v_ptr + i_b * stride_cvb + i_h * stride_cvh, chunk_mask_ptr, i_b, o_m, m_m, n,
                tl.where(is_last, m, 0), m, stride_ckm, stride_cvm, stride_mb, stride_mn, scale_log2, softcap_log2,
                tanh_scale, D, DV, BLOCK_N, BLOCK_DV, HAS_MASK, HAS_SOFTCAP, PRECISION,
            )  # fmt: skip
        # a query that has seen nothing gets zeros, and -inf
        safe_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
        b_out = acc / safe_sum[:, None]
        b_lse = tl.where(row_sum == 0.0, float("-inf"), row_max + tl.log2(safe_sum))
        m_out = m_m[:, None] & (o_dv < DV)[None, :]
        if (unit == 0) & is_last:  # the whole segment: nothing to merge
            rows = i_s.to(tl.int64) * num_rows + o_m
            tl.store(out_ptr + rows[:, None] * DV + o_dv[None, :], b_out.to(out_ptr.dtype.element_ty), mask=m_out)
            if HAS_LSE:
                tl.store(lse_ptr + rows, b_lse * TO_BASE_E, mask=m_m)
        else:
            rows = (i_c + i_s).to(tl.int64) * num_rows + o_m
            tl.store(part_ptr + rows[:, None] * DV + o_dv[None, :], b_out, mask=m_out)
            tl.store(part_lse_ptr + rows, b_lse, mask=m_m)
        left -= take
        i_s += 1
        unit = 0


@triton.jit
def _mass_kernel(
    mass_ptr, logits_ptr, lse_ptr, starts_ptr, lengths_ptr, num_rows, power,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """exp(logit - lse) to a power, summed over a segment's queries. Programs of one segment take its tiles in turn."""
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
        tl.store(mass_ptr + start + o_n, tl.sum(tl.exp2((b_logits - b_lse[None, :]) * power), 1), mask=m_n)


def launch_config(dtype: torch.dtype, dim: int, rows: int, plain: bool) -> dict[str, int]:
    """Tile sizes and launch options.

    dim: the larger of D and Dv;  rows: queries times query heads of a group
    plain: neither softcap, nor mask, nor mass, which take registers of their own

    Measured on an H200, among the tiles that compile without a spill on sm_80 and sm_90 under every triton supported.
    More rows than BLOCK_M go to programs side by side, which find the entries in the L2 cache. fp32 products in three
    tf32 passes spill a little from head dim 128 on, whatever the tile. More warps of the same tile take half as long
    again.
    """
    block_m = 16
    if dtype == torch.float32:
        block_n, stages, warps = (32, 3, 4) if dim <= 64 else (32, 2, 4) if dim <= 128 else (16, 2, 8)
    elif dim > 128:
        block_n, stages, warps = 32, 2, 4
    elif rows > 16:
        block_m, block_n, stages, warps = (32, 32, 3, 4) if plain else (32, 64, 2, 8)
    elif dim <= 64:
        block_n, stages, warps = 64, 4, 4
    else:
        block_n, stages, warps = 64, 3 if plain else 2, 4
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "STAGES": stages, "num_warps": warps}


@on_its_device
def triton_attention(
    query: Tensor,
    segments: Segments | BlockSegments,
    chunk: Chunk | None,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    plan: WorkPlan | None = None,
    with_lse: bool = False,
    with_mass: bool = False,
    mass_power: float = 1.0,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Shapes as in `decode_attention`."""
    starts, blocks, offsets, sizes, rows_per_block = None, None, None, None, 0
    if isinstance(segments, BlockSegments):
        blocks, offsets, sizes = segments.blocks, segments.offsets, segments.sizes
        rows_per_block = segments.rows_per_block
    else:
        segments = segments.on(query.device)
        starts = segments.starts
    keys, values, lengths = segments.keys, segments.values, segments.lengths
    batch, num_q_heads, n, dim = query.shape
    num_segments, value_dim = len(segments), values.shape[1]
    num_kv_heads = num_segments // batch
    group = num_q_heads // num_kv_heads
    rows = group * n
    if plan is None:
        plan = triton_plan(lengths, default_programs(lengths.device), unit_of(max(dim, value_dim)))
    num_programs = plan.programs.shape[0]
    chunk_key, chunk_value, mask = (None,) * 3 if chunk is None else (chunk.key, chunk.value, chunk.mask)
    query, chunk_key, chunk_value = (
        x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (query, chunk_key, chunk_value)
    )
    mask = None if mask is None else mask.contiguous().view(torch.uint8)
    out = query.new_empty(batch, num_q_heads, n, value_dim)
    single = torch.float32
    lse = query.new_empty(batch, num_q_heads, n, dtype=single) if with_lse or with_mass else None
    logits = query.new_empty(keys.shape[0], rows, dtype=single) if with_mass else None
    parts = query.new_empty(num_programs + num_segments, rows, value_dim, dtype=single)
    part_lse = query.new_empty(num_programs + num_segments, rows, dtype=single)
    plain = softcap is None and mask is None and not with_mass
    config = launch_config(query.dtype, max(dim, value_dim), rows, plain)
    # programmatic dependent launch: the merge is set up while the pieces are still being computed
    early = at_least_hopper(query.device)
    _attend_kernel[(cdiv(rows, config["BLOCK_M"]), num_programs)](
        query, keys, values, out, lse, parts, part_lse, logits, sink_logits, chunk_key, chunk_value, mask,
        starts, lengths, plan.units, plan.quantum, plan.programs, blocks, offsets, sizes,
        *query.stride()[:3], *_strides(chunk_key), *_strides(chunk_value),
        0 if mask is None or mask.shape[0] == 1 else mask.stride(0), 0 if mask is None else mask.stride(2),
        0 if blocks is None else blocks.stride(0), rows_per_block,
        num_segments, num_kv_heads, group, n, 0 if chunk is None else len(chunk),
        scale * LOG2E, (softcap or 0.0) * LOG2E, 2.0 / (softcap or 1.0),
        D=dim, DV=value_dim, K_ROW=keys.stride(0), V_ROW=values.stride(0), UNIT=plan.unit,
        BLOCK_D=max(16, next_power_of_2(dim)), BLOCK_DV=max(16, next_power_of_2(value_dim)),
        HAS_SOFTCAP=softcap is not None, HAS_CHUNK=chunk is not None, HAS_MASK=mask is not None,
        HAS_SINK=sink_logits is not None, HAS_LOGITS=with_mass, HAS_LSE=lse is not None,
        HAS_BLOCKS=blocks is not None, EARLY=early,
        # plain tf32 would lose three digits of an fp32 model
        PRECISION="tf32x3" if query.dtype == torch.float32 else "tf32", **config, **LAUNCH,
    )  # fmt: skip
    merge_pieces(out, lse, parts, part_lse, plan.pieces, num_programs, early)
    if logits is None:
        return out, lse, None
    mass = query.new_zeros(keys.shape[0], dtype=single)
    _mass_kernel[(num_segments, cdiv(4 * num_programs, num_segments))](
        mass, logits, lse, starts, lengths, rows, mass_power, BLOCK_M=next_power_of_2(rows), BLOCK_N=64, **LAUNCH
    )
    return out, lse if with_lse else None, mass


def _strides(chunk: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if chunk is None else chunk.stride()[:3]
