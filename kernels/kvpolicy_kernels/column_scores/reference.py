"""The definition and the torch path: one segment at a time, its queries in blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpolicy_kernels.attention.reference import kv_heads, probabilities, query_blocks, scores
from kvpolicy_kernels.segments import Chunk, Segments


def reference_column_scores(
    query: Tensor,
    segments: Segments,
    chunk: Chunk | None,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    query_mask: Tensor | None = None,
    power: float = 1.0,
    *,
    largest: bool = False,
) -> Tensor:
    """Shapes as in `column_scores`; largest: of the weights instead of their sum."""
    batch, _, n, _ = query.shape
    longest = int(segments.lengths.max())
    m = 0 if chunk is None else len(chunk)
    out = torch.zeros(batch, len(segments) // batch, longest + m, device=query.device)
    combine = torch.maximum if largest else torch.add
    for head in kv_heads(query, segments, chunk, sink_logits):
        b, length, k = head.b, head.length, head.keys.float()
        total = out[b, head.h]
        for rows, columns, visible in query_blocks(n, head):
            q = query[b, head.q_heads, rows].float()
            p = probabilities(scores(q, k[:columns], scale, softcap), head.sinks, visible)
            if query_mask is not None:
                p = p.masked_fill(~query_mask[b, rows, None], 0.0)  # not a product: padding may give NaN
            p = p if power == 1 else p**power
            came = p.amax((0, 1)) if largest else p.sum((0, 1))
            fresh = slice(longest, longest + columns - length)
            total[:length] = combine(total[:length], came[:length])
            total[fresh] = combine(total[fresh], came[length:])
    return out
