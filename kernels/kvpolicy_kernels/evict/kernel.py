"""Triton: a program, or several where segments are long, looks through a segment for its least key.

Programs of one segment take its tiles in turn, each as far as the device's own length says, and a second launch picks
the least of what they found. There are no atomics, and the host knows neither length nor result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpolicy_kernels.backend import LAUNCH, on_its_device
from kvpolicy_kernels.evict.reference import NO_KEY as _NO_KEY
from kvpolicy_kernels.evict.reference import PINNED as _PINNED
from kvpolicy_kernels.evict.reference import PLAIN as _PLAIN
from kvpolicy_kernels.evict.reference import POSITION_BITS as _POSITION_BITS
from kvpolicy_kernels.evict.reference import RECENT as _RECENT
from kvpolicy_kernels.evict.reference import Spans
from kvpolicy_kernels.tiles import cdiv, next_power_of_2

PROGRAMS = 528  # four for each multiprocessor of an H200
SHORT = 512  # entries that one program looks through without help
CONFIG = {"BLOCK": 512, "num_warps": 4}
NO_KEY, POSITION_BITS = tl.constexpr(_NO_KEY), tl.constexpr(_POSITION_BITS)
PLAIN, RECENT, PINNED = tl.constexpr(_PLAIN), tl.constexpr(_RECENT), tl.constexpr(_PINNED)


@triton.jit
def _ordered(score):
    """float32 to int64 in [0, 2**32), order-preserving."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(bits < 0, -1 - bits, bits + 0x80000000)


@triton.jit
def _key(score, position, recent, recent_window, spans, NUM_SPANS: tl.constexpr, HAS_SCORES: tl.constexpr):
    """The keys of candidates that are there, and of absent ones -1, which has every bit."""
    key = tl.full(position.shape, PLAIN, tl.int64)
    if HAS_SCORES:
        key = PLAIN + (_ordered(score) << POSITION_BITS)
    key = tl.where((recent_window > 0) & (position >= recent), RECENT, key)
    for i in tl.static_range(NUM_SPANS):
        key = tl.where((position >= spans[i][0]) & (position < spans[i][1]), PINNED, key)
    return key | position


@triton.jit
def _least(key, column):
    """The least key of a tile and its column, the first of equals."""
    least = tl.min(key)
    return least, tl.min(tl.where(key == least, column, NO_KEY))


@triton.jit
def _store_slot(slots_ptr, rows_ptr, i_s, start, column, HAS_ROWS: tl.constexpr):
    if HAS_ROWS:
        row = tl.load(rows_ptr + i_s)
        tl.store(rows_ptr + i_s, tl.where(row < 0, start + column, row))
    else:
        tl.store(slots_ptr + i_s, column)


@triton.jit(do_not_specialize=["num_heads", "recent_window"])
def _evict_kernel(
    scores_ptr, positions_ptr, starts_ptr, lengths_ptr, seen_ptr, rows_ptr, keys_ptr, slots_ptr, num_heads,
    recent_window, spans,
    NUM_SPANS: tl.constexpr, HAS_SCORES: tl.constexpr, HAS_ROWS: tl.constexpr, IS_SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i_s, i_p, num_parts = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    # scalars of this program's segment, which need no mask
    start, length = tl.load(starts_ptr + i_s), tl.load(lengths_ptr + i_s)
    if HAS_ROWS:
        length = tl.where(tl.load(rows_ptr + i_s) < 0, length, 0)  # else there is nothing to look for
    recent = tl.load(seen_ptr + i_s // num_heads) - recent_window
    o_n = tl.arange(0, BLOCK).to(tl.int64)
    best = tl.full([BLOCK], NO_KEY, tl.int64)
    slot = tl.full([BLOCK], -1, tl.int64)
    for first in range(i_p * BLOCK, length, num_parts * BLOCK):
        column = first + o_n
        m_n = column < length
        position = tl.load(positions_ptr + start + column, mask=m_n, other=-1).to(tl.int64)
        score = tl.zeros([BLOCK], tl.float32)
        if HAS_SCORES:
            score = tl.load(scores_ptr + start + column, mask=m_n, other=0.0)
        key = _key(score, position, recent, recent_window, spans, NUM_SPANS, HAS_SCORES)
        key = tl.where(position < 0, NO_KEY, key)
        slot = tl.where(key < best, column, slot)  # a later column of an equal key does not count
        best = tl.minimum(key, best)
    key, column = _least(best, slot)
    place = i_s * num_parts + i_p
    if IS_SPLIT:
        tl.store(slots_ptr + place, column)
        tl.store(keys_ptr + place, key)
    else:
        _store_slot(slots_ptr, rows_ptr, i_s, start, column, HAS_ROWS)


@triton.jit(do_not_specialize=["num_parts"])
def _merge_kernel(
    keys_ptr, slots_ptr, starts_ptr, rows_ptr, out_ptr, num_parts, HAS_ROWS: tl.constexpr, BLOCK_P: tl.constexpr
):
    i_s = tl.program_id(0).to(tl.int64)
    o_p = tl.arange(0, BLOCK_P)
    m_p = o_p < num_parts
    key = tl.load(keys_ptr + i_s * num_parts + o_p, mask=m_p, other=NO_KEY)
    slot = tl.load(slots_ptr + i_s * num_parts + o_p, mask=m_p, other=-1)
    column = _least(key, slot)[1]
    _store_slot(out_ptr, rows_ptr, i_s, tl.load(starts_ptr + i_s), column, HAS_ROWS)


@triton.jit(
    do_not_specialize=["stride_ss", "stride_fb", "num_heads", "heads_seen", "width", "num_columns", "recent_window"]
)
def _rank_kernel(
    scores_ptr, positions_ptr, starts_ptr, lengths_ptr, seen_ptr, fresh_ptr, places_ptr, keys_ptr,
    stride_ss, stride_fb, num_heads, heads_seen, width, num_columns, recent_window, spans,
    NUM_SPANS: tl.constexpr, HAS_SCORES: tl.constexpr, HAS_FRESH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_s = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_n = column < num_columns
    # scalars of this program's segment, which need no mask
    start, length = tl.load(starts_ptr + i_s), tl.load(lengths_ptr + i_s)
    recent = tl.load(seen_ptr + i_s // heads_seen) - recent_window
    # [BLOCK]; columns from the length to the width hold nothing
    position = tl.load(positions_ptr + start + column, mask=column < length, other=-1).to(tl.int64)
    if HAS_FRESH:
        # [BLOCK]
        token = tl.load(
            fresh_ptr + i_s // num_heads * stride_fb + (column - width), mask=m_n & (column >= width), other=-1
        )
        position = tl.where(column < width, position, token)
    score = tl.zeros([BLOCK], tl.float32)
    if HAS_SCORES:
        # [BLOCK]
        score = tl.load(scores_ptr + i_s * stride_ss + column, mask=m_n, other=0.0)
    place = i_s * num_columns + column
    tl.store(places_ptr + place, position, mask=m_n)
    tl.store(keys_ptr + place, _key(score, position, recent, recent_window, spans, NUM_SPANS, HAS_SCORES), mask=m_n)


def parts_of(num_segments: int, num_rows: int) -> int:
    """Programs that share a segment, as the arena is large: the lengths are the device's."""
    return max(1, min(PROGRAMS // num_segments, cdiv(num_rows, num_segments * SHORT)))


def merge_config(num_parts: int) -> dict[str, int]:
    """Launch options of the second launch."""
    block_p = next_power_of_2(num_parts)
    return {"BLOCK_P": block_p, "num_warps": max(1, min(4, block_p // 128))}


@on_its_device
def triton_evict(
    scores: Tensor | None,
    positions: Tensor,
    starts: Tensor,
    lengths: Tensor,
    seen: Tensor,
    num_sink_tokens: int,
    recent_window: int,
    spans: Spans,
    rows: Tensor | None = None,
) -> Tensor:
    """Shapes as in `evict`. rows: int64 [S], of `fill_rows`, which is what is returned then."""
    slots = torch.empty_like(starts) if rows is None else rows
    if not len(starts):
        return slots
    num_parts = parts_of(len(starts), len(positions))
    is_split = num_parts > 1
    found = starts.new_empty(2, len(starts), num_parts) if is_split else (None, slots)
    pinned = ((0, num_sink_tokens), *spans)
    _evict_kernel[(len(starts), num_parts)](
        scores, positions, starts, lengths, seen, rows, found[0], found[1], len(starts) // len(seen), recent_window,
        pinned, NUM_SPANS=len(pinned), HAS_SCORES=scores is not None, HAS_ROWS=rows is not None, IS_SPLIT=is_split,
        **CONFIG, **LAUNCH,
    )  # fmt: skip
    if is_split:
        _merge_kernel[(len(starts),)](
            found[0], found[1], starts, rows, slots, num_parts, HAS_ROWS=rows is not None, **merge_config(num_parts),
            **LAUNCH,
        )  # fmt: skip
    return slots


@on_its_device
def triton_rank(
    scores: Tensor | None,
    positions: Tensor,
    starts: Tensor,
    lengths: Tensor,
    seen: Tensor,
    width: int,
    fresh: Tensor | None,
    num_sink_tokens: int,
    recent_window: int,
    spans: Spans,
) -> tuple[Tensor, Tensor]:
    """Shapes as in `rank`."""
    count, num_columns = starts.shape[0], width + (0 if fresh is None else fresh.shape[1])
    places, keys = starts.new_empty(2, count, num_columns).unbind()
    if places.numel():
        pinned = ((0, num_sink_tokens), *spans)
        _rank_kernel[(cdiv(num_columns, CONFIG["BLOCK"]), count)](
            scores, positions, starts, lengths, seen, fresh, places, keys,
            0 if scores is None else scores.stride(0), 0 if fresh is None else fresh.stride(0),
            1 if fresh is None else count // fresh.shape[0], count // seen.shape[0], width, num_columns, recent_window,
            pinned, NUM_SPANS=len(pinned), HAS_SCORES=scores is not None, HAS_FRESH=fresh is not None,
            **CONFIG, **LAUNCH,
        )  # fmt: skip
    return places, keys
