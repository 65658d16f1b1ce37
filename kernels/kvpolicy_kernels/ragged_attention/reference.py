"""The definition and the torch path: one segment at a time, its queries in blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128  # queries; of 64, 128, 256 and 512 the best for softcap and column_scores, SDPA hardly cares


class Segment(NamedTuple):
    """One KV head of one sequence, and its part of the arguments."""

    b: int
    h: int
    heads: slice  # query heads
    rows: slice  # of the arena
    length: int
    keys: Tensor  # [length + m, D], the chunk last
    chunk_mask: Tensor | None  # bool [n, m]
    sinks: Tensor | None  # [group]


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
    n = query.shape[2]
    out = query.new_zeros(*query.shape[:3], values.shape[1])
    segments = split_segments(query, keys, starts, lengths, sink_logits, chunk_key, chunk_mask)
    for i, (b, h, heads, arena_rows, length, k, seen_tokens, sinks) in enumerate(segments):
        v = values[arena_rows] if chunk_value is None else torch.cat([values[arena_rows], chunk_value[b, h]])
        seen_entries = None if entry_mask is None else entry_mask[i]
        if seen_entries is not None and seen_entries.shape != (n, length):
            raise ValueError(f"expected entry_mask[{i}] {[n, length]}, got {list(seen_entries.shape)}")
        for rows, columns, visible in query_blocks(n, length, len(k) - length, seen_entries, seen_tokens, k.device):
            if columns == 0:
                continue  # nothing to see: the zeros stay
            q = query[b, heads, rows]
            if softcap is None and sinks is None:
                out[b, heads, rows] = _sdpa(q, k[:columns], v[:columns], scale, visible)
            else:
                p = probabilities(scores(q, k[:columns], scale, softcap), sinks, visible)
                out[b, heads, rows] = p.to(v.dtype) @ v[:columns]
    return out


def segment_list(starts: Tensor, lengths: Tensor, num_rows: int) -> list[tuple[int, int]]:
    """(start, length) of every segment."""
    segments = list(zip(starts.tolist(), lengths.tolist(), strict=True))
    for i, (start, length) in enumerate(segments):
        if start < 0 or length < 0 or start + length > num_rows:
            raise ValueError(f"segment {i} of {length} rows from row {start} leaves the arena of {num_rows} rows")
    return segments


def split_segments(
    query: Tensor,
    keys: Tensor,
    starts: Tensor,
    lengths: Tensor,
    sink_logits: Tensor | None,
    chunk_key: Tensor | None,
    chunk_mask: Tensor | None,
) -> Iterator[Segment]:
    """Shapes as in `ragged_attention`."""
    num_kv_heads = len(starts) // query.shape[0]
    group = query.shape[1] // num_kv_heads
    for i, (start, length) in enumerate(segment_list(starts, lengths, len(keys))):
        b, h = divmod(i, num_kv_heads)
        heads, rows = slice(h * group, (h + 1) * group), slice(start, start + length)
        k = keys[rows] if chunk_key is None else torch.cat([keys[rows], chunk_key[b, h]])
        mask = None if chunk_mask is None else chunk_mask[b % len(chunk_mask), 0]
        yield Segment(b, h, heads, rows, length, k, mask, None if sink_logits is None else sink_logits[heads])


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
    product = (q @ k.t()).float()
    return product.mul_(scale) if softcap is None else torch.tanh(product.mul_(scale / softcap)).mul_(softcap)


def probabilities(scores: Tensor, sinks: Tensor | None, visible: Tensor | None) -> Tensor:
    """Softmax of [group, n, length], which it overwrites, with one more logit per head; zero where nothing is seen."""
    if visible is not None:
        scores.masked_fill_(~visible, float("-inf"))
    if sinks is not None:
        column = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:2], 1)
        return torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1]
    p = torch.softmax(scores, -1)
    return p if visible is None else p.masked_fill_(~visible.any(-1, keepdim=True), 0.0)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, visible: Tensor | None) -> Tensor:
    """q: [group, n, D]; k: [length, D]; v: [length, Dv]; visible: bool [n, length]. Returns [group, n, Dv]."""
    k, v = (x.expand(1, q.shape[0], -1, -1) for x in (k, v))
    out = F.scaled_dot_product_attention(q[None], k, v, attn_mask=visible, scale=scale)[0]
    # a query that sees nothing: not every backend behind the call promises zeros
    return out if visible is None else out.masked_fill(~visible.any(-1, keepdim=True), 0.0)
