"""The definition and the torch path: one segment at a time, its queries in blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpolicy_kernels.ragged_attention.reference import probabilities, query_blocks, scores, split_segments


def reference_column_scores(
    query: Tensor,
    keys: Tensor,
    starts: Tensor,
    lengths: Tensor,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    chunk_key: Tensor | None = None,
    chunk_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    *,
    power: float = 1.0,
    largest: bool = False,
) -> Tensor:
    """Shapes as in `column_scores`; largest: of the weights instead of their sum."""
    batch, _, n, _ = query.shape
    longest = int(lengths.max())
    m = 0 if chunk_key is None else chunk_key.shape[2]
    out = torch.zeros(batch, len(starts) // batch, longest + m, device=query.device)
    combine = torch.maximum if largest else torch.add
    segments = split_segments(query, keys, starts, lengths, sink_logits, chunk_key, chunk_mask)
    for b, h, heads, _, length, k, seen_tokens, sinks in segments:
        k = k.float()
        for rows, columns, visible in query_blocks(n, length, m, None, seen_tokens, k.device):
            p = probabilities(scores(query[b, heads, rows].float(), k[:columns], scale, softcap), sinks, visible)
            if query_mask is not None:
                p = p.masked_fill(~query_mask[b, rows, None], 0.0)  # not a product: padding may give NaN
            p = p if power == 1 else p**power
            came = p.amax((0, 1)) if largest else p.sum((0, 1))
            fresh = slice(longest, longest + columns - length)
            out[b, h, :length] = combine(out[b, h, :length], came[:length])
            out[b, h, fresh] = combine(out[b, h, fresh], came[length:])
    return out
