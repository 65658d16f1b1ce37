"""The definition and the torch path: one segment at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpolicy_kernels.ragged_attention.reference import query_blocks, scores, split_segments


def reference_decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    lengths: Tensor,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    chunk_key: Tensor | None = None,
    chunk_value: Tensor | None = None,
    chunk_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes as in `decode_attention`. Returns (out, lse, mass)."""
    n = query.shape[2]
    out = query.new_zeros(*query.shape[:3], values.shape[1])
    lse = torch.full(query.shape[:3], float("-inf"), device=query.device)
    mass = torch.zeros(keys.shape[0], device=query.device)
    segments = split_segments(query, keys, starts, lengths, sink_logits, chunk_key, chunk_mask)
    for (b, h, heads, rows, length, k, seen_tokens, sinks), start in zip(segments, starts.tolist(), strict=True):
        v = values[rows] if chunk_value is None else torch.cat([values[rows], chunk_value[b, h]])
        for block, columns, visible in query_blocks(n, length, len(k) - length, None, seen_tokens, k.device):
            logits = scores(query[b, heads, block], k[:columns], scale, softcap)  # [group, block, columns]
            if visible is not None:
                logits.masked_fill_(~visible, float("-inf"))
            whole = logits.logsumexp(-1)
            if sinks is not None:
                whole = torch.logaddexp(whole, sinks.float()[:, None])
            p = (logits - whole[..., None]).exp().masked_fill_(logits.isneginf(), 0.0)  # -inf - -inf is NaN
            out[b, heads, block] = p.to(v.dtype) @ v[:columns]
            lse[b, heads, block] = whole
            mass[start : start + length] += p[..., :length].sum((0, 1))
    return out, lse, mass
