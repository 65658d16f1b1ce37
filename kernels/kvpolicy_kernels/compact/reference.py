"""The definition and the torch path."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import torch
from torch import Tensor


def reference_compact(out: Tensor, out_rows: Tensor, source: Tensor, source_rows: Tensor) -> None:
    """Shapes as in `compact`."""
    if len(source_rows) == 0:
        return
    if source.dim() != out.dim():
        source, source_rows = _rows_in_memory(source, source_rows)
    out.index_copy_(0, out_rows, source.index_select(0, source_rows).to(out.dtype))


def _rows_in_memory(chunk: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """A view of a [B, H, n, ...] chunk's memory as rows, and the row of each flattened (b, h, t).

    Flattening a strided chunk would copy it whole, and indexing it by b, h and t is five times slower than
    `index_select`. Rows begin at every common divisor of the strides, so that they may overlap.
    """
    _, num_heads, length = chunk.shape[:3]
    unit = gcd(*chunk.stride()[:3]) or 1  # expanded dimensions have stride 0
    per_b, per_h, per_t = (stride // unit for stride in chunk.stride()[:3])
    last = sum((size - 1) * stride for size, stride in zip(chunk.shape, (per_b, per_h, per_t), strict=False))
    segment = rows // length
    places = segment // num_heads * per_b + segment % num_heads * per_h + rows % length * per_t
    return chunk.as_strided((last + 1, *chunk.shape[3:]), (unit, *chunk.stride()[3:])), places


def reference_compact_in_place(arenas: Sequence[Tensor], starts: Tensor, columns: Tensor, counts: Tensor) -> None:
    """Shapes as in `compact_in_place`."""
    place = torch.arange(columns.shape[1], device=columns.device).expand_as(columns)
    counted = place < counts[:, None]
    steps = columns.diff(dim=1, prepend=torch.full_like(columns[:, :1], -1))
    if bool((counted & (steps < 1)).any()):
        raise ValueError("compact_in_place: the columns of a segment must ascend, and from 0 on")
    rows, source_rows = ((starts[:, None] + column)[counted] for column in (place, columns))
    for arena in arenas:
        arena.index_copy_(0, rows, arena.index_select(0, source_rows))
