"""The definition and the torch path."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def reference_append(arenas: Sequence[Tensor], rows: Tensor, entries: Sequence[Tensor]) -> None:
    """Shapes as in `append`."""
    for arena, entry in zip(arenas, entries, strict=True):
        arena.index_copy_(0, rows, entry.reshape(rows.shape[0], *arena.shape[1:]).to(arena.dtype))


def reference_append_next(
    arenas: Sequence[Tensor],
    entries: Sequence[Tensor],
    starts: Tensor,
    lengths: Tensor,
    capacities: Tensor,
    cursors: Tensor,
    num_pinned: int,
    slots: Tensor | None,
) -> Tensor:
    """Shapes as in `append_next`."""
    grows = lengths < capacities
    column = torch.where(grows, lengths, num_pinned + cursors if slots is None else slots)
    kept = grows | ((column >= 0) & (column < lengths))
    if slots is None:
        ring = (lengths - num_pinned).clamp(min=1)
        cursors.copy_(torch.where(grows, cursors, (cursors + 1) % ring))
    rows = torch.where(kept, starts + column, -1)
    lengths += grows
    shapes = [(len(rows), *arena.shape[1:]) for arena in arenas]
    reference_append(
        arenas, rows[kept], [entry.reshape(shape)[kept] for entry, shape in zip(entries, shapes, strict=True)]
    )
    return rows
