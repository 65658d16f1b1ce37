"""Checks the arguments and picks the backend."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kvpolicy_kernels.append.reference import reference_append


def append(arenas: Sequence[Tensor], rows: Tensor, entries: Sequence[Tensor]) -> None:
    """In place `arena[rows] = entry`, cast to the arena's dtype, for each pair.

    arenas: each [R] or [R, D], with a D of its own
    rows: int64 [S] on the arenas' device, distinct; one row per segment
    entries: one per arena, [S] or [S, D] or any shape that reshapes to it, such as [B, num_kv_heads, 1, D]

    Raises `ValueError` for shapes or counts that do not fit.
    """
    if len(arenas) != len(entries):
        raise ValueError(f"append: {len(arenas)} arenas need as many entries, got {len(entries)}")
    for arena, entry in zip(arenas, entries, strict=True):
        if entry.numel() != rows.shape[0] * arena.shape[1:].numel():
            raise ValueError(
                f"append: {rows.shape[0]} rows of an arena {list(arena.shape)} need an entry of shape "
                f"{[rows.shape[0], *arena.shape[1:]]}, got {list(entry.shape)}"
            )
    reference_append(arenas, rows, entries)
