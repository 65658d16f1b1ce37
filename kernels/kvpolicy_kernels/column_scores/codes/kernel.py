"""Triton: the two passes of `column_scores` over codes of 8 or 4 bits, which are never written back as numbers.

Queries are turned once, as for a decoding step, and a score is what it is there. The tokens of the chunk, and the exact
copies of entries, are columns of their own: they take part in the log-sum-exp of a row beside the entries, those that
have a copy left out, and an entry that has a copy gets the copy's mass.

Tiles are entries times rows, so that the numbers of codes go from registers into products. Rows are those of `turn`;
log-sum-exps have the order that they have over numbers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpolicy_kernels.backend import LAUNCH, interpreted, multiplies_from_shared_memory, on_its_device
from kvpolicy_kernels.base2 import LOG2E
from kvpolicy_kernels.column_scores.kernel import Columns, PlainColumns, parts_of, write_scores
from kvpolicy_kernels.encoded_attention.kernel import halves, plane_block
from kvpolicy_kernels.encoded_attention.numbers.kernel import fast_exp2, step_and_zero
from kvpolicy_kernels.encoded_attention.scores.kernel import (
    centre_frequency,
    centre_wave,
    code_products,
    code_scores,
    turned_tile,
)
from kvpolicy_kernels.encoded_attention.turn.kernel import turned
from kvpolicy_kernels.segments import Chunk, EncodedSegments, ExactCopies, Segments
from kvpolicy_kernels.tiles import cdiv, next_power_of_2


@triton.jit
def _row_place(o_m, n, GROUP: tl.constexpr):
    """Of rows that are query r % n of the group's head r // n, where they are among rows `i * GROUP + g`."""
    return o_m % n * GROUP + o_m // n


@triton.jit
def _code_tile(
    first, kw_ptr, ks_ptr, positions_ptr, since_ptr, i_s, start, length, num_sinks, D: tl.constexpr,
    KW_ROW: tl.constexpr, KS_ROW: tl.constexpr, PLANES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
    TURNS: tl.constexpr, HIDES: tl.constexpr,
):  # fmt: skip
    """Words [BLOCK_N, BLOCK_W], steps, zeros and positions [BLOCK_N], and which entries are there, and not hidden."""
    o_n = first + tl.arange(0, BLOCK_N)
    o_w = tl.arange(0, BLOCK_W)
    m_n = o_n < length
    rows = start + o_n
    # [BLOCK_N, BLOCK_W] and [BLOCK_N] twice
    b_kw = tl.load(
        kw_ptr + rows[:, None] * KW_ROW + o_w[None, :], mask=m_n[:, None] & (o_w < D // PLANES)[None, :], other=0
    )
    k_step, k_zero = step_and_zero(tl.load(ks_ptr + rows * KS_ROW, mask=m_n, other=0))
    b_position, seen = o_n, m_n
    if TURNS or HIDES:
        b_position = tl.load(positions_ptr + rows, mask=m_n, other=0)
    if HIDES:
        seen = m_n & (b_position >= num_sinks) & (b_position < tl.load(since_ptr + i_s))
    return b_kw, k_step, k_zero, b_position, seen


@triton.jit(do_not_specialize=["n"])
def _code_lse_kernel(
    q_ptr, sums_ptr, of_centre_ptr, frequency_ptr, kw_ptr, ks_ptr, positions_ptr, since_ptr, start_ptr, length_ptr,
    part_ptr, n, num_sinks, softcap_log2, tanh_scale,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, KW_ROW: tl.constexpr, KS_ROW: tl.constexpr,
    PLANES: tl.constexpr, PACKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
    COEFFICIENTS: tl.constexpr, BLOCK_C: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HIDES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """q, sums, of_centre, since: see `turn`;  kw, ks: see `_attend_kernel`;  part: see `_merge_kernel`"""
    i_s = tl.program_id(1).to(tl.int64)
    i_part = tl.program_id(2)
    num_rows = GROUP * n
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < num_rows
    start, length = tl.load(start_ptr + i_s), tl.load(length_ptr + i_s).to(tl.int32)
    q0, q1, q2, q3, q_offset, q_sum, row_scale, q_centre, b_high, b_low = turned_tile(
        q_ptr, sums_ptr, of_centre_ptr, i_s * num_rows + o_m, m_m, D, PLANES, BLOCK_W, COEFFICIENTS, BLOCK_C
    )
    b_frequency = centre_frequency(frequency_ptr, i_s % NUM_KV_HEADS, COEFFICIENTS, BLOCK_C)
    tiles = tl.cdiv(length, BLOCK_N)
    part = tl.cdiv(tiles, tl.num_programs(2))
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    for tile in range(i_part * part, tl.minimum((i_part + 1) * part, tiles)):
        b_kw, k_step, k_zero, b_position, seen = _code_tile(
            tile * BLOCK_N, kw_ptr, ks_ptr, positions_ptr, since_ptr, i_s, start, length, num_sinks,
            D, KW_ROW, KS_ROW, PLANES, BLOCK_N, BLOCK_W, COEFFICIENTS > 1, HIDES,
        )  # fmt: skip
        # [BLOCK_N, BLOCK_M]
        scores = code_products(b_kw, k_step, k_zero, q0, q1, q2, q3, q_offset, q_sum, PLANES, PACKED, PRECISION)
        b_wave = centre_wave(b_position, b_frequency, COEFFICIENTS, PACKED, q0.dtype)
        scores = code_scores(
            scores, b_wave, row_scale, q_centre, b_high, b_low, softcap_log2, tanh_scale, COEFFICIENTS,
            HAS_SOFTCAP, q0.dtype == tl.float32, PRECISION,
        )  # fmt: skip
        scores = tl.where(seen[:, None], scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 0))
        # a row that has seen nothing yet keeps -inf; subtracting it would give NaN
        safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        row_sum = row_sum * fast_exp2(row_max - safe_max, PACKED)
        row_sum += tl.sum(fast_exp2(scores - safe_max[None, :], PACKED), 0)
        row_max = new_max
    # [BLOCK_M], -inf for a row that has seen nothing
    tl.store(
        part_ptr + (i_part * tl.num_programs(1) + i_s) * num_rows + _row_place(o_m, n, GROUP),
        row_max + tl.log2(tl.where(row_sum == 0.0, 1.0, row_sum)),
        mask=m_m,
    )


@triton.jit(do_not_specialize=["n", "longest", "stride_out"])
def _code_mass_kernel(
    q_ptr, sums_ptr, of_centre_ptr, frequency_ptr, kw_ptr, ks_ptr, positions_ptr, since_ptr, start_ptr, length_ptr,
    lse_ptr, copies_ptr, out_ptr, slots, longest, stride_out, power, n, num_sinks, softcap_log2, tanh_scale,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, KW_ROW: tl.constexpr, KS_ROW: tl.constexpr,
    PLANES: tl.constexpr, PACKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
    COEFFICIENTS: tl.constexpr, BLOCK_C: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HIDES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """copies: float32 [S, slots], the mass of each;  the rest as in `_code_lse_kernel`"""
    i_s = tl.program_id(1).to(tl.int64)
    num_rows = GROUP * n
    start, length = tl.load(start_ptr + i_s), tl.load(length_ptr + i_s).to(tl.int32)
    first_column = tl.program_id(0) * BLOCK_N
    o_n = first_column + tl.arange(0, BLOCK_N)
    b_kw, k_step, k_zero, b_position, seen = _code_tile(
        first_column, kw_ptr, ks_ptr, positions_ptr, since_ptr, i_s, start, length, num_sinks,
        D, KW_ROW, KS_ROW, PLANES, BLOCK_N, BLOCK_W, COEFFICIENTS > 1, HIDES,
    )  # fmt: skip
    b_frequency = centre_frequency(frequency_ptr, i_s % NUM_KV_HEADS, COEFFICIENTS, BLOCK_C)
    b_wave = centre_wave(b_position, b_frequency, COEFFICIENTS, PACKED, q_ptr.dtype.element_ty)
    mass = tl.zeros([BLOCK_N], dtype=tl.float32)
    # no row sees a tile behind its segment
    for first in range(tl.where(first_column < length, 0, num_rows), num_rows, BLOCK_M):
        o_m = first + tl.arange(0, BLOCK_M)
        m_m = o_m < num_rows
        q0, q1, q2, q3, q_offset, q_sum, row_scale, q_centre, b_high, b_low = turned_tile(
            q_ptr, sums_ptr, of_centre_ptr, i_s * num_rows + o_m, m_m, D, PLANES, BLOCK_W, COEFFICIENTS, BLOCK_C
        )
        # [BLOCK_M]
        b_lse = tl.load(lse_ptr + i_s * num_rows + _row_place(o_m, n, GROUP), mask=m_m, other=float("inf"))
        # [BLOCK_N, BLOCK_M]
        scores = code_products(b_kw, k_step, k_zero, q0, q1, q2, q3, q_offset, q_sum, PLANES, PACKED, PRECISION)
        scores = code_scores(
            scores, b_wave, row_scale, q_centre, b_high, b_low, softcap_log2, tanh_scale, COEFFICIENTS,
            HAS_SOFTCAP, q0.dtype == tl.float32, PRECISION,
        )  # fmt: skip
        # a row that does not count sees nothing: its scores may be NaN
        visible = seen[:, None] & (b_lse < float("inf"))[None, :]
        exponents = tl.where(visible, scores - b_lse[None, :], float("-inf")) * power
        mass += tl.sum(fast_exp2(exponents, PACKED), 1)
    if HIDES:
        is_sink = b_position < num_sinks
        slot = tl.where(is_sink, b_position, num_sinks + b_position % (slots - num_sinks))
        hidden = (o_n < length) & ~seen
        mass = tl.where(hidden, tl.load(copies_ptr + i_s * slots + slot, mask=hidden, other=0.0), mass)
    # [BLOCK_N], 0 in columns between the segment's length and `longest`
    tl.store(out_ptr + i_s * stride_out + o_n, mass, mask=o_n < longest)


def launch_config(
    dtype: torch.dtype, dim: int, num_rows: int, coefficients: int, from_shared: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """Tile sizes and launch options of `_code_lse_kernel` and `_code_mass_kernel`.

    num_rows: queries times the query group;  coefficients: of the keys' centre for a channel, those of waves but one
    from_shared: tensor cores take the queries from shared memory, so that no registers hold them

    In 16 bits nothing spills on sm_80 and sm_90, and several programs fit on an SM.
    """
    if dtype == torch.float32:
        side = 32 if dim <= 64 else 16
        tiles = [(side, side, 4), (side, side, 4)]
    else:
        owned = 64 if dim <= 128 and (from_shared or not coefficients) else 32
        tiles = [(owned, 64, 4), (32 if coefficients > 1 else 64, 128, 8)]
    least = max(16, next_power_of_2(num_rows))
    row, column = (
        {"BLOCK_M": min(rows, least), "BLOCK_N": entries, "num_warps": warps, "num_stages": 3 if dim <= 128 else 2}
        for rows, entries, warps in tiles
    )
    return row, column


class CodedColumns:
    """Entries that are codes, those that have copies left out. of_copies: float32 [S, slots], which gets their mass"""

    def __init__(
        self,
        query: Tensor,
        segments: EncodedSegments,
        longest: int,
        scale: float,
        softcap: float | None,
        copies: ExactCopies | None,
        of_copies: Tensor | None,
    ) -> None:
        """query: with contiguous rows"""
        (batch, num_q_heads, n, dim), centre = query.shape, segments.key_centre
        (words, scales), planes = segments.keys, segments.entry_format.codes_in_word
        self.num_segments, self.longest, self.of_copies = len(segments), longest, of_copies
        num_kv_heads, single = self.num_segments // batch, torch.float32
        group = num_q_heads // num_kv_heads
        num_rows, packed = n * group, query.dtype != single and not interpreted()
        from_shared = multiplies_from_shared_memory(query.device)
        coefficients = 0 if centre is None else len(centre.coefficients)
        self.row_config, self.column_config = launch_config(
            query.dtype, dim, num_rows, coefficients, from_shared
        )  # fmt: skip
        self.row_blocks = cdiv(num_rows, self.row_config["BLOCK_M"])
        walked = cdiv(longest, self.row_config["BLOCK_N"])
        self.num_parts = parts_of(walked, self.num_segments * self.row_blocks)
        turned_query, sums, of_centre, since = turned(
            query, num_kv_heads, planes, scale * LOG2E, rotated=segments.entry_format.rotated, packed=packed,
            centre=centre, copies=copies,
        )  # fmt: skip
        self.inputs = (
            turned_query, sums, of_centre, None if centre is None else centre.frequencies, words, halves(scales),
            segments.positions, since, segments.starts, segments.lengths,
        )  # fmt: skip
        self.numbers = (
            n, 0 if copies is None else copies.num_sinks, (softcap or 0.0) * LOG2E, 2.0 / (softcap or 1.0)
        )  # fmt: skip
        self.constants = {
            "NUM_KV_HEADS": num_kv_heads,
            "GROUP": group,
            "D": dim,
            "KW_ROW": words.stride(0),
            "KS_ROW": scales.stride(0) // 2,
            "PLANES": planes,
            "PACKED": packed,
            "BLOCK_W": plane_block(dim, planes),
            "COEFFICIENTS": coefficients,
            "BLOCK_C": max(16, next_power_of_2(coefficients - 1)),
            "HAS_SOFTCAP": softcap is not None,
            "HIDES": copies is not None,
            # plain tf32 would lose three digits of an fp32 model
            "PRECISION": "tf32x3" if query.dtype == single else "tf32",
        }

    def write_lse(self, parts: Tensor) -> None:
        _code_lse_kernel[(self.row_blocks, self.num_segments, self.num_parts)](
            *self.inputs, parts, *self.numbers, **self.constants, **self.row_config, **LAUNCH
        )

    def write_mass(self, lse: Tensor, out: Tensor, power: float) -> None:
        """After that of the copies is known."""
        slots = 0 if self.of_copies is None else self.of_copies.shape[1]
        _code_mass_kernel[(cdiv(self.longest, self.column_config["BLOCK_N"]), self.num_segments)](
            *self.inputs, lse, self.of_copies, out, slots, self.longest, out.stride(0), float(power), *self.numbers,
            **self.constants, **self.column_config, **LAUNCH,
        )  # fmt: skip


@on_its_device
def triton_coded_scores(
    query: Tensor,
    segments: EncodedSegments,
    longest: int,
    chunk: Chunk | None,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    query_mask: Tensor | None = None,
    power: float = 1.0,
    copies: ExactCopies | None = None,
) -> Tensor:
    """Shapes as in `column_scores`; the tables of the segments on the device, longest: lengths.max()."""
    (batch, _, n, dim), num_segments = query.shape, len(segments)
    m = 0 if chunk is None else len(chunk)
    out = query.new_empty((batch, num_segments // batch, longest + m), dtype=torch.float32)
    if n == 0 or out.numel() == 0:
        return out.zero_()
    query = query if query.stride(-1) == 1 else query.contiguous()
    flat, of_copies, columns = out.flatten(0, 1), None, list[tuple[Columns, Tensor]]()
    none = segments.lengths.new_zeros(num_segments)
    rows = query.new_empty(0, dim)
    no_entries = Segments(rows, rows, none, none)
    if copies is not None and longest:
        seen = (copies.positions >= 0)[:, None, None].expand(-1, -1, n, -1)
        of_copies = flat.new_empty(num_segments, copies.positions.shape[1])
        beside = Chunk(copies.key, copies.value, seen)
        columns.append((PlainColumns(query, no_entries, 0, beside, scale, softcap), of_copies))
    if chunk is not None and m:
        columns.append((PlainColumns(query, no_entries, 0, chunk, scale, softcap), flat[:, longest:]))
    if longest:
        columns.append((CodedColumns(query, segments, longest, scale, softcap, copies, of_copies), flat))
    write_scores(columns, query, num_segments // batch, sink_logits, query_mask, power)
    return out
