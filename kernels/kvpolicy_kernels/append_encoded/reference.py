"""The definition and the torch path."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvpolicy_kernels.append import append
from kvpolicy_kernels.encode import encode
from kvpolicy_kernels.formats import Encoded, EntryFormat
from kvpolicy_kernels.key_centre import KeyCentre
from kvpolicy_kernels.segments import ExactCopies


def reference_append_encoded(
    columns: Sequence[Encoded],
    rows: Tensor,
    entries: Sequence[Tensor],
    entry_format: EntryFormat,
    arenas: Sequence[Tensor],
    numbers: Sequence[Tensor],
    positions: Tensor,
    copies: ExactCopies | None,
    key_centre: KeyCentre | None,
) -> None:
    """Arguments as in `append_encoded`."""
    key, value = entries
    if key_centre is not None:
        own = torch.arange(len(rows), device=rows.device) % key_centre.shape[0]
        key = key.float().reshape(len(rows), -1) - key_centre.of(own, positions)
    codes = [part for pair in encode([key, value], entry_format) for part in pair]
    append([*(part for pair in columns for part in pair), *arenas], rows, [*codes, *numbers])
    if copies is None:
        return
    batch, heads = copies.key.shape[:2]
    positions = positions[::heads]
    sequence, slot = positions.new_tensor(range(batch)), copies.slots(positions)
    for own, entry in zip((copies.key, copies.value), entries, strict=True):
        own[sequence, :, slot] = entry.reshape(batch, heads, -1).to(own.dtype)
    copies.positions[sequence, slot] = positions.to(copies.positions.dtype)
