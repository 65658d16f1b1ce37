"""The definition and the torch path: one segment at a time, its queries in blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpolicy_kernels.ragged_attention.reference import probabilities, query_blocks, scores, segment_list


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
) -> Tensor:
    """Shapes as in `column_scores`."""
    batch, num_q_heads, n, _ = query.shape
    segments = segment_list(starts, lengths, keys.shape[0])
    num_kv_heads = len(segments) // batch
    group = num_q_heads // num_kv_heads
    longest = max(length for _, length in segments)
    m = 0 if chunk_key is None else chunk_key.shape[2]
    out = torch.zeros(batch, num_kv_heads, longest + m, device=query.device)
    for i, (start, length) in enumerate(segments):
        b, h = divmod(i, num_kv_heads)
        heads = slice(h * group, (h + 1) * group)
        k = keys[start : start + length]
        if chunk_key is not None:
            k = torch.cat([k, chunk_key[b, h]])
        k = k.float()
        mask = None if chunk_mask is None else chunk_mask[b % chunk_mask.shape[0], 0]
        sinks = None if sink_logits is None else sink_logits[heads]
        for rows, columns, visible in query_blocks(n, length, m, None, mask, query.device):
            q = query[b, heads, rows].float()
            p = probabilities(scores(q, k[:columns], scale, softcap), sinks, visible)
            if query_mask is not None:
                p = p.masked_fill(~query_mask[b, rows, None], 0.0)  # not a product: padding may give NaN
            mass = p.sum((0, 1))
            out[b, h, :length] += mass[:length]
            out[b, h, longest : longest + columns - length] += mass[length:]
    return out
