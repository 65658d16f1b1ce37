"""The definition and the torch path: the entries are decoded, all of them, and attended to."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpolicy_kernels.attention.reference import reference_decode_attention
from kvpolicy_kernels.segments import Chunk, EncodedSegments, ExactCopies, Segments


def reference_encoded_attention(
    query: Tensor,
    segments: EncodedSegments,
    chunk: Chunk | None,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    mass_power: float = 1.0,
    copies: ExactCopies | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes as in `encoded_attention`. Returns (out, lse, mass)."""
    decoded = segments.decoded(query.dtype)
    if copies is not None:
        assert segments.positions is not None  # has been checked
        decoded = _with_copies(decoded, segments.positions, copies, len(segments) // len(query))
    return reference_decode_attention(query, decoded, chunk, scale, softcap, sink_logits, mass_power)


def _with_copies(decoded: Segments, positions: Tensor, copies: ExactCopies, num_kv_heads: int) -> Segments:
    """The entries with the copies in their places."""
    keys, values = decoded.keys.clone(), decoded.values.clone()
    for i, (start, length) in enumerate(decoded.bounds()):
        b, h = divmod(i, num_kv_heads)
        rows = torch.arange(start, start + length, device=keys.device)
        rows = rows[copies.hidden(positions[rows], b)]
        slots = copies.slots(positions[rows])
        keys[rows], values[rows] = copies.key[b, h, slots], copies.value[b, h, slots]
    return Segments(keys, values, decoded.starts, decoded.lengths)
