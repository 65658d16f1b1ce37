"""Checks the arguments and picks the backend."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kvpolicy_kernels.append.reference import reference_append
from kvpolicy_kernels.backend import Backend, uses_triton


def append(arenas: Sequence[Tensor], rows: Tensor, entries: Sequence[Tensor], *, backend: Backend = "auto") -> None:
    """In place `arena[rows] = entry`, cast to the arena's dtype, for each pair.

    arenas: each [R] or [R, D], with a D of its own
    rows: int64 [S] on the arenas' device, distinct; one row per segment
    entries: one per arena, [S] or [S, D] or any shape that reshapes to it, such as [B, num_kv_heads, 1, D]
    backend: "auto" is Triton on CUDA and torch elsewhere

    Raises `ValueError` for shapes or counts that do not fit, and for a backend that cannot run here.
    """
    _check_entries(arenas, rows.shape[0], entries)
    if uses_triton("append", backend, rows):
        from kvpolicy_kernels.append.kernel import triton_append

        triton_append(arenas, rows, entries)
    else:
        reference_append(arenas, rows, entries)


def _check_entries(arenas: Sequence[Tensor], num_segments: int, entries: Sequence[Tensor]) -> None:
    if len(arenas) != len(entries):
        raise ValueError(f"append: {len(arenas)} arenas need as many entries, got {len(entries)}")
    for arena, entry in zip(arenas, entries, strict=True):
        if arena.dim() not in (1, 2):
            raise ValueError(f"append: expected arenas [R] or [R, D], got {list(arena.shape)}")
        if entry.numel() != num_segments * (arena.shape[1] if arena.dim() == 2 else 1):
            raise ValueError(
                f"append: {num_segments} rows of an arena {list(arena.shape)} need an entry of shape "
                f"{[num_segments, *arena.shape[1:]]}, got {list(entry.shape)}"
            )
