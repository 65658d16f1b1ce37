"""Triton: the log-sum-exp of every row, then the mass of every column, without a matrix of scores.

A row is one query of one query head: row `i * GROUP + g` of a segment is query i of the g-th head of the KV head's
group. So a key is read once for the whole group, and a block of rows spans few queries. A tile of columns lies in the
arena or in the chunk, never in both: the tiles of the entries come first, those of the chunk's tokens after them.

`_row_lse_kernel` owns a block of rows and walks the tiles that it sees; where blocks are few, several programs share
the walk. `_merge_kernel` joins their parts, adds the learned sink and silences rows that do not count.
`_column_mass_kernel` owns a tile of columns and walks the rows that see it: no atomics, and each key is loaded once.
A power of a weight is a factor of its exponent.
Scores are in base 2; the host folds the factor into the scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpolicy_kernels.backend import LAUNCH, on_its_device
from kvpolicy_kernels.base2 import LOG2E
from kvpolicy_kernels.segments import Chunk, Segments
from kvpolicy_kernels.softcap.kernel import capped
from kvpolicy_kernels.tiles import cdiv, next_power_of_2

TO_BASE_2 = tl.constexpr(LOG2E)
PROGRAMS = 528  # that share the walks over the keys, where there are fewer blocks: two on each of 132 SMs, twice
NO_BOUND = tl.constexpr(2**30)  # more than there are queries or tokens
COUNTS = ("num_rows", "num_tokens", "token_shift")  # change from call to call and must not compile again


@triton.jit
def _query_tile(
    q_base, first, num_rows, stride_qh, stride_qm, stride_qd,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows [BLOCK_M, BLOCK_D] and the query that each belongs to. q_base: at the first head of the group."""
    o_m = first + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    o_head = (o_m % GROUP).to(tl.int64) * stride_qh
    # [BLOCK_M, BLOCK_D]
    b_q = tl.load(
        q_base + (o_head + (o_m // GROUP).to(tl.int64) * stride_qm)[:, None] + o_d[None, :] * stride_qd,
        mask=(o_m < num_rows)[:, None] & (o_d < D)[None, :],
        other=0.0,
    )
    return b_q, o_m // GROUP


@triton.jit
def _key_tile(
    tile, entry_tiles, k_base, c_base, length, num_tokens, token_shift, stride_cn, stride_cd,
    D: tl.constexpr, K_ROW: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Keys [BLOCK_N, BLOCK_D], their columns, whether these are tokens of the chunk, and who sees them.

    Query i sees column c of the tile iff `c < limit and c <= i + shift`.
    """
    in_chunk = tile >= entry_tiles
    limit = tl.where(in_chunk, num_tokens, length)
    shift = tl.where(in_chunk, token_shift, NO_BOUND)
    o_n = (tile - tl.where(in_chunk, entry_tiles, 0)) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    base = tl.where(in_chunk, c_base, k_base)
    stride_n, stride_d = tl.where(in_chunk, stride_cn, K_ROW), tl.where(in_chunk, stride_cd, 1)
    # [BLOCK_N, BLOCK_D]
    b_k = tl.load(
        base + o_n[:, None].to(tl.int64) * stride_n + o_d[None, :] * stride_d,
        mask=(o_n < limit)[:, None] & (o_d < D)[None, :],
        other=0.0,
    )
    return b_k, o_n, in_chunk, limit, shift


@triton.jit
def _scores(
    b_a, b_b, o_i, o_n, in_chunk, limit, shift, mask_ptr, o_mask, stride_mi, stride_mn,
    scale_log2, softcap_log2, tanh_scale,
    HAS_SOFTCAP: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[A, B] from b_a [A, D] and b_b [B, D], -inf where query o_i does not see column o_n.

    Rows against columns, with o_i [A, 1] and o_n [1, B], or columns against rows, with o_n [A, 1] and o_i [1, B].
    """
    # [A, B]
    scores = tl.dot(b_a, tl.trans(b_b), input_precision=PRECISION) * scale_log2
    if HAS_SOFTCAP:
        scores = capped(scores, softcap_log2, tanh_scale, b_a.dtype == tl.float32)
    visible = o_n <= tl.minimum(o_i + shift, limit - 1)
    if HAS_MASK:  # noqa: SIM102 (known when compiling, the other is not)
        if in_chunk:
            # [A, B]
            visible &= tl.load(
                mask_ptr + o_mask + o_i.to(tl.int64) * stride_mi + o_n.to(tl.int64) * stride_mn,
                mask=visible,
                other=False,
            )
    return tl.where(visible, scores, float("-inf"))


@triton.jit(do_not_specialize=COUNTS)
def _row_lse_kernel(
    q_ptr, k_ptr, c_ptr, mask_ptr, start_ptr, length_ptr, part_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_cb, stride_ch, stride_cn, stride_cd,
    stride_mb, stride_mi, stride_mn,
    num_rows, num_tokens, token_shift, scale_log2, softcap_log2, tanh_scale,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, K_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # last rows first: under the causal mask they see the most
    i_m = tl.num_programs(0) - 1 - tl.program_id(0)
    i_s = tl.program_id(1).to(tl.int64)
    i_part = tl.program_id(2)
    i_b, i_h = i_s // NUM_KV_HEADS, i_s % NUM_KV_HEADS
    start, length = tl.load(start_ptr + i_s), tl.load(length_ptr + i_s).to(tl.int32)
    q_base = q_ptr + i_b * stride_qb + i_h * GROUP * stride_qh
    b_q, o_i = _query_tile(q_base, i_m * BLOCK_M, num_rows, stride_qh, stride_qm, stride_qd, GROUP, D, BLOCK_M, BLOCK_D)
    # rows past the end see nothing: an explicit mask has no row for them
    o_i = tl.where(i_m * BLOCK_M + tl.arange(0, BLOCK_M) < num_rows, o_i, -NO_BOUND - 1)
    # the tiles that the last query of the block sees, in equal parts
    last_query = (tl.minimum((i_m + 1) * BLOCK_M, num_rows) - 1) // GROUP
    tokens = tl.minimum(tl.maximum(last_query + token_shift + 1, 0), num_tokens)
    entry_tiles = tl.cdiv(length, BLOCK_N)
    tiles = entry_tiles + tl.cdiv(tokens, BLOCK_N)
    part = tl.cdiv(tiles, tl.num_programs(2))
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    for tile in range(i_part * part, tl.minimum((i_part + 1) * part, tiles)):
        b_k, o_n, in_chunk, limit, shift = _key_tile(
            tile, entry_tiles, k_ptr + start * K_ROW, c_ptr + i_b * stride_cb + i_h * stride_ch,
            length, num_tokens, token_shift, stride_cn, stride_cd, D, K_ROW, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        scores = _scores(
            b_q, b_k, o_i[:, None], o_n[None, :], in_chunk, limit, shift,
            mask_ptr, i_b * stride_mb, stride_mi, stride_mn,
            scale_log2, softcap_log2, tanh_scale, HAS_SOFTCAP, HAS_MASK, PRECISION,
        )  # fmt: skip
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        # a row that has seen nothing yet keeps -inf; subtracting it would give NaN
        safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        row_sum = row_sum * tl.exp2(row_max - safe_max) + tl.sum(tl.exp2(scores - safe_max[:, None]), 1)
        row_max = new_max
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    # [BLOCK_M], -inf for a row that has seen nothing
    tl.store(
        part_ptr + (i_part * tl.num_programs(1) + i_s) * num_rows + o_m,
        row_max + tl.log2(tl.where(row_sum == 0.0, 1.0, row_sum)),
        mask=o_m < num_rows,
    )


@triton.jit(do_not_specialize=["num_rows", "num_parts"])
def _merge_kernel(
    part_ptr, sink_ptr, counts_ptr, lse_ptr, stride_cb, stride_ci, num_rows, num_parts,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr,
    HAS_SINK: tl.constexpr, HAS_QUERY_MASK: tl.constexpr,
):  # fmt: skip
    """The log-sum-exp of a row's parts; +inf, which turns every weight into 0, for a row that does not count.

    part: float32 [num_parts, S, num_rows], -inf where nothing was seen
    """
    i_s = tl.program_id(1).to(tl.int64)
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_p = tl.arange(0, BLOCK_P)
    m_m = o_m < num_rows
    # [BLOCK_P, BLOCK_M]
    b_part = tl.load(
        part_ptr + (o_p * tl.num_programs(1) + i_s)[:, None] * num_rows + o_m[None, :],
        mask=(o_p < num_parts)[:, None] & m_m[None, :],
        other=float("-inf"),
    )
    top = tl.max(b_part, 0)
    if HAS_SINK:
        # [BLOCK_M]; every row has a head, also those past the end
        sink = tl.load(sink_ptr + (i_s % NUM_KV_HEADS) * GROUP + o_m % GROUP).to(tl.float32) * TO_BASE_2
        top = tl.maximum(top, sink)
    safe = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2(b_part - safe[None, :]), 0)
    if HAS_SINK:
        total += tl.exp2(sink - safe)
    lse = tl.where(top == float("-inf"), float("inf"), safe + tl.log2(tl.where(total == 0.0, 1.0, total)))
    if HAS_QUERY_MASK:
        # [BLOCK_M]
        counts = tl.load(
            counts_ptr + (i_s // NUM_KV_HEADS) * stride_cb + (o_m // GROUP).to(tl.int64) * stride_ci,
            mask=m_m,
            other=False,
        )
        lse = tl.where(counts, lse, float("inf"))
    tl.store(lse_ptr + i_s * num_rows + o_m, lse, mask=m_m)


@triton.jit(do_not_specialize=[*COUNTS, "longest", "stride_out"])
def _column_mass_kernel(
    q_ptr, k_ptr, c_ptr, mask_ptr, start_ptr, length_ptr, lse_ptr, out_ptr, longest, stride_out,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_cb, stride_ch, stride_cn, stride_cd,
    stride_mb, stride_mi, stride_mn,
    num_rows, num_tokens, token_shift, scale_log2, softcap_log2, tanh_scale, power,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, K_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_s = tl.program_id(1).to(tl.int64)
    i_b, i_h = i_s // NUM_KV_HEADS, i_s % NUM_KV_HEADS
    start, length = tl.load(start_ptr + i_s), tl.load(length_ptr + i_s).to(tl.int32)
    b_k, o_n, in_chunk, limit, shift = _key_tile(
        tl.program_id(0), tl.cdiv(longest, BLOCK_N), k_ptr + start * K_ROW, c_ptr + i_b * stride_cb + i_h * stride_ch,
        length, num_tokens, token_shift, stride_cn, stride_cd, D, K_ROW, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    q_base = q_ptr + i_b * stride_qb + i_h * GROUP * stride_qh
    # from the first query that sees the tile's first column; no row sees a tile behind its segment
    first_column = tl.min(o_n, 0)
    first_row = tl.maximum(first_column - shift, 0) * GROUP // BLOCK_M * BLOCK_M
    mass = tl.zeros([BLOCK_N], dtype=tl.float32)
    for first in range(tl.where(first_column < limit, first_row, num_rows), num_rows, BLOCK_M):
        b_q, o_i = _query_tile(q_base, first, num_rows, stride_qh, stride_qm, stride_qd, GROUP, D, BLOCK_M, BLOCK_D)
        o_m = first + tl.arange(0, BLOCK_M)
        # [BLOCK_M]
        b_lse = tl.load(lse_ptr + i_s * num_rows + o_m, mask=o_m < num_rows, other=float("inf"))
        # a row that does not count sees nothing: its scores may be NaN
        o_i = tl.where(b_lse == float("inf"), -NO_BOUND - 1, o_i)
        scores = _scores(
            b_k, b_q, o_i[None, :], o_n[:, None], in_chunk, limit, shift,
            mask_ptr, i_b * stride_mb, stride_mi, stride_mn,
            scale_log2, softcap_log2, tanh_scale, HAS_SOFTCAP, HAS_MASK, PRECISION,
        )  # fmt: skip
        mass += tl.sum(tl.exp2((scores - b_lse[None, :]) * power), 1)
    # [BLOCK_N], columns between the segment's length and `longest` among them: these get 0
    tl.store(
        out_ptr + i_s * stride_out + tl.where(in_chunk, longest, 0) + o_n,
        mass,
        mask=o_n < tl.where(in_chunk, num_tokens, longest),
    )


def launch_config(dtype: torch.dtype, dim: int, num_rows: int) -> tuple[dict[str, int], dict[str, int]]:
    """Tile sizes and launch options of `_row_lse_kernel` and `_column_mass_kernel`.

    num_rows: queries times the query group

    What a program owns is larger than what it walks over. 16-bit tiles compile without a spill on sm_80 and sm_90, and
    up to head dim 128 two programs fit on an SM: one multiplies while the other exponentiates. fp32 products in three
    tf32 passes need registers for the split operands, so their tiles are small.
    """
    if dtype != torch.float32:
        owned, walked = 128, 64
    else:
        owned, walked = (64, 32) if dim <= 64 else (32, 32) if dim <= 128 else (16, 16)
    least = max(16, next_power_of_2(num_rows))
    return tuple(
        {
            "BLOCK_M": rows,
            "BLOCK_N": columns,
            "num_warps": 8 if rows * columns >= 8192 else 4,
            "num_stages": 3 if dim <= 128 else 2,
        }
        for rows, columns in ((min(owned, least), walked), (min(walked, least), owned))
    )


class Columns(Protocol):
    """What queries attend to, or a part of it."""

    num_parts: int
    """In which the columns of a row are walked."""

    def write_lse(self, parts: Tensor) -> None:
        """Of every row, in every part: float32 [num_parts, S, num_rows]."""

    def write_mass(self, lse: Tensor, out: Tensor, power: float) -> None:
        """Of every column. lse: float32 [S, num_rows], over all columns;  out: float32 [S, columns], rows contiguous"""


class PlainColumns:
    """Entries that are rows of numbers, and behind the longest segment of them the tokens of a chunk."""

    def __init__(
        self,
        query: Tensor,
        segments: Segments,
        longest: int,
        chunk: Chunk | None,
        scale: float,
        softcap: float | None,
    ) -> None:
        (batch, num_q_heads, n, dim), keys, self.longest = query.shape, segments.keys, longest
        self.num_segments = len(segments)
        num_kv_heads = self.num_segments // batch
        group = num_q_heads // num_kv_heads
        m, mask = (0, None) if chunk is None else (len(chunk), chunk.mask)
        num_rows = n * group
        self.row_config, self.column_config = launch_config(query.dtype, dim, num_rows)
        self.row_blocks = cdiv(num_rows, self.row_config["BLOCK_M"])
        walked, self.column_tiles = (
            cdiv(longest, config["BLOCK_N"]) + cdiv(m, config["BLOCK_N"])
            for config in (self.row_config, self.column_config)
        )
        self.num_parts = parts_of(walked, self.num_segments * self.row_blocks)
        # without a chunk no tile lies in one, and any pointer will do
        chunk_key, chunk_strides = (keys, (0, 0, 0, 1)) if chunk is None else (chunk.key, chunk.key.stride())
        mask_strides, token_shift = (0, 0, 0), m - n
        if mask is not None:
            mask_strides = (mask.stride(0) if len(mask) > 1 else 0, *mask.stride()[2:])
            token_shift = NO_BOUND.value
        self.inputs = (query, keys, chunk_key, mask, segments.starts, segments.lengths)
        self.numbers = (
            *query.stride(), *chunk_strides, *mask_strides, num_rows, m, token_shift,
            scale * LOG2E, (softcap or 0.0) * LOG2E, 2.0 / (softcap or 1.0),
        )  # fmt: skip
        self.constants = {
            "NUM_KV_HEADS": num_kv_heads,
            "GROUP": group,
            "D": dim,
            "K_ROW": keys.stride(0),
            "BLOCK_D": max(16, next_power_of_2(dim)),
            "HAS_SOFTCAP": softcap is not None,
            "HAS_MASK": mask is not None,
            # plain tf32 would lose three digits of an fp32 model
            "PRECISION": "tf32x3" if query.dtype == torch.float32 else "tf32",
        }

    def write_lse(self, parts: Tensor) -> None:
        _row_lse_kernel[(self.row_blocks, self.num_segments, self.num_parts)](
            *self.inputs, parts, *self.numbers, **self.constants, **self.row_config, **LAUNCH
        )

    def write_mass(self, lse: Tensor, out: Tensor, power: float) -> None:
        _column_mass_kernel[(self.column_tiles, self.num_segments)](
            *self.inputs, lse, out, self.longest, out.stride(0), *self.numbers, float(power),
            **self.constants, **self.column_config, **LAUNCH,
        )  # fmt: skip


def parts_of(walked: int, blocks: int) -> int:
    """Programs that share the walk of each of so many blocks of rows over `walked` tiles of columns."""
    return max(1, min(PROGRAMS // blocks, walked))


def write_scores(
    columns: Sequence[tuple[Columns, Tensor]],
    query: Tensor,
    num_kv_heads: int,
    sink_logits: Tensor | None,
    query_mask: Tensor | None,
    power: float,
) -> None:
    """Columns that share the mass of the queries, each with where its own is written, in this order."""
    batch, num_q_heads, n, _ = query.shape
    num_segments, group = batch * num_kv_heads, num_q_heads // num_kv_heads
    num_rows = n * group
    parts = query.new_empty(sum(x.num_parts for x, _ in columns), num_segments, num_rows, dtype=torch.float32)
    lse = parts.new_empty(num_segments, num_rows)
    for (own, _), part in zip(columns, parts.split([x.num_parts for x, _ in columns]), strict=True):
        own.write_lse(part)
    block_p = next_power_of_2(len(parts))
    block_m = max(1, min(64, 4096 // block_p))
    _merge_kernel[(cdiv(num_rows, block_m), num_segments)](
        parts, sink_logits, query_mask, lse, *((0, 0) if query_mask is None else query_mask.stride()),
        num_rows, len(parts), NUM_KV_HEADS=num_kv_heads, GROUP=group, BLOCK_P=block_p, BLOCK_M=block_m,
        HAS_SINK=sink_logits is not None, HAS_QUERY_MASK=query_mask is not None, **LAUNCH,
    )  # fmt: skip
    for own, out in columns:
        own.write_mass(lse, out, power)


@on_its_device
def triton_column_scores(
    query: Tensor,
    segments: Segments,
    longest: int,
    chunk: Chunk | None,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    query_mask: Tensor | None = None,
    power: float = 1.0,
) -> Tensor:
    """Shapes as in `column_scores`; the tables of the segments on the device, longest: lengths.max()."""
    num_kv_heads, m = len(segments) // len(query), 0 if chunk is None else len(chunk)
    out = query.new_empty((len(query), num_kv_heads, longest + m), dtype=torch.float32)
    if query.shape[2] == 0 or out.numel() == 0:
        return out.zero_()
    columns = PlainColumns(query, segments, longest, chunk, scale, softcap)
    write_scores([(columns, out.flatten(0, 1))], query, num_kv_heads, sink_logits, query_mask, power)
    return out
