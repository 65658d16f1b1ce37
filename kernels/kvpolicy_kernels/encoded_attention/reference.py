"""The definition and the torch path: the entries are decoded, all of them, and attended to."""

from __future__ import annotations

from torch import Tensor

from kvpolicy_kernels.attention.reference import reference_decode_attention
from kvpolicy_kernels.segments import Chunk, EncodedSegments, ExactCopies


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
    decoded = segments.decoded(query.dtype, copies)
    return reference_decode_attention(query, decoded, chunk, scale, softcap, sink_logits, mass_power)
