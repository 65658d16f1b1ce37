"""The definition and the torch path: one segment at a time, its queries in blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256


def reference_ragged_attention(
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
    entry_mask: Sequence[Tensor] | None = None,
) -> Tensor:
    """Shapes as in `ragged_attention`."""
    batch, num_q_heads, n, _ = query.shape
    segments = segment_list(starts, lengths, keys.shape[0])
    num_kv_heads = len(segments) // batch
    group = num_q_heads // num_kv_heads
    out = query.new_zeros(batch, num_q_heads, n, values.shape[1])
    for i, (start, length) in enumerate(segments):
        b, h = divmod(i, num_kv_heads)
        heads = slice(h * group, (h + 1) * group)
        k, v = keys[start : start + length], values[start : start + length]
        if chunk_key is not None and chunk_value is not None:
            k, v = torch.cat([k, chunk_key[b, h]]), torch.cat([v, chunk_value[b, h]])
        seen = None if entry_mask is None else entry_mask[i]
        mask = None if chunk_mask is None else chunk_mask[b % chunk_mask.shape[0], 0]
        sinks = None if sink_logits is None else sink_logits[heads]
        for rows, columns, visible in query_blocks(n, length, k.shape[0] - length, seen, mask, query.device):
            if columns == 0:
                continue  # nothing to see: the zeros stay
            q = query[b, heads, rows]
            if softcap is None and sinks is None:
                o = _sdpa(q, k[:columns], v[:columns], scale, visible)
            else:
                p = probabilities(scores(q, k[:columns], scale, softcap), sinks, visible)
                o = p.to(v.dtype) @ v[:columns]
            out[b, heads, rows] = o
    return out


def segment_list(starts: Tensor, lengths: Tensor, num_rows: int) -> list[tuple[int, int]]:
    """(start, length) of every segment."""
    segments = list(zip(starts.tolist(), lengths.tolist(), strict=True))
    for i, (start, length) in enumerate(segments):
        if start < 0 or length < 0 or start + length > num_rows:
            raise ValueError(f"segment {i} of {length} rows from row {start} leaves the arena of {num_rows} rows")
    return segments


def query_blocks(
    n: int, length: int, m: int, entry_mask: Tensor | None, chunk_mask: Tensor | None, device: torch.device
) -> Iterator[tuple[slice, int, Tensor | None]]:
    """What `n` queries see of `length` entries and then `m` tokens of the chunk, in blocks of queries.

    entry_mask: bool [n, length];  chunk_mask: bool [n, m], default causal, aligned to the end
    Yields the block's queries, the number of columns that matter to it, and bool [block, columns], None if all is seen.
    """
    for begin in range(0, n, BLOCK):
        end = min(begin + BLOCK, n)
        tokens = m if chunk_mask is not None else min(max(end + m - n, 0), m)
        if entry_mask is None and tokens == 0:
            yield slice(begin, end), length, None
            continue
        visible = torch.ones(end - begin, length + tokens, dtype=torch.bool, device=device)
        if entry_mask is not None:
            visible[:, :length] = entry_mask[begin:end]
        if chunk_mask is not None:
            visible[:, length:] = chunk_mask[begin:end]
        else:
            visible[:, length:].tril_(begin + m - n)
        yield slice(begin, end), length + tokens, visible


def scores(q: Tensor, k: Tensor, scale: float, softcap: float | None) -> Tensor:
    """q: [group, n, D]; k: [length, D]. Returns fp32 [group, n, length]."""
    product = (q @ k.t()).float() * scale
    return product if softcap is None else softcap * torch.tanh(product / softcap)


def probabilities(scores: Tensor, sinks: Tensor | None, visible: Tensor | None) -> Tensor:
    """Softmax of [group, n, length] with one more logit per head; rows that see nothing are zero."""
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        column = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:2], 1)
        return torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1]
    p = torch.softmax(scores, -1)
    return p if visible is None else p.masked_fill_(~visible.any(-1, keepdim=True), 0.0)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, visible: Tensor | None) -> Tensor:
    """q: [group, n, D]; k: [length, D]; v: [length, Dv]; visible: bool [n, length]. Returns [group, n, Dv]."""
    k, v = (x.expand(1, q.shape[0], -1, -1) for x in (k, v))
    out = F.scaled_dot_product_attention(q[None], k, v, attn_mask=visible, scale=scale)[0]
    return out if visible is None else out.masked_fill(~visible.any(-1, keepdim=True), 0.0)
