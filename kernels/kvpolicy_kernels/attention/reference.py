"""The definitions and the torch paths: one segment at a time, its queries in blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kvpolicy_kernels.segments import Chunk, Segments

BLOCK = 128  # queries; of 64, 128, 256 and 512 the best for softcap and column_scores, SDPA hardly cares


class KVHead(NamedTuple):
    """What the queries of one KV head of one sequence see: its segment, and behind it its tokens of the chunk."""

    b: int
    h: int
    q_heads: slice
    rows: slice  # of the arena
    length: int
    keys: Tensor  # [length + m, D]
    mask: Tensor | None  # the chunk's, bool [n, m]
    sinks: Tensor | None  # [group]


def reference_ragged_attention(
    query: Tensor,
    segments: Segments,
    chunk: Chunk | None,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    entry_mask: Sequence[Tensor] | None = None,
) -> Tensor:
    """Shapes as in `ragged_attention`."""
    n = query.shape[2]
    out = query.new_zeros(*query.shape[:3], segments.values.shape[1])
    for i, head in enumerate(kv_heads(query, segments, chunk, sink_logits)):
        b, heads, k = head.b, head.q_heads, head.keys
        v = _values(segments, chunk, head)
        seen_entries = None if entry_mask is None else entry_mask[i]
        for rows, columns, visible in query_blocks(n, head, seen_entries):
            if columns == 0:
                continue  # nothing to see: the zeros stay
            q = query[b, heads, rows]
            if softcap is None and head.sinks is None:
                out[b, heads, rows] = _sdpa(q, k[:columns], v[:columns], scale, visible)
            else:
                p = probabilities(scores(q, k[:columns], scale, softcap), head.sinks, visible)
                out[b, heads, rows] = p.to(v.dtype) @ v[:columns]
    return out


def reference_decode_attention(
    query: Tensor,
    segments: Segments,
    chunk: Chunk | None,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    mass_power: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes as in `decode_attention`. Returns (out, lse, mass)."""
    n = query.shape[2]
    out = query.new_zeros(*query.shape[:3], segments.values.shape[1])
    lse = torch.full(query.shape[:3], float("-inf"), device=query.device)
    mass = torch.zeros(segments.keys.shape[0], device=query.device)
    for head in kv_heads(query, segments, chunk, sink_logits):
        b, heads, k = head.b, head.q_heads, head.keys
        v = _values(segments, chunk, head)
        for rows, columns, visible in query_blocks(n, head):
            logits = scores(query[b, heads, rows], k[:columns], scale, softcap)  # [group, rows, columns]
            if visible is not None:
                logits.masked_fill_(~visible, float("-inf"))
            whole = logits.logsumexp(-1)
            if head.sinks is not None:
                whole = torch.logaddexp(whole, head.sinks.float()[:, None])
            p = (logits - whole[..., None]).exp().masked_fill_(logits.isneginf(), 0.0)  # -inf - -inf is NaN
            out[b, heads, rows] = p.to(v.dtype) @ v[:columns]
            lse[b, heads, rows] = whole
            mass[head.rows] += p[..., : head.length].pow(mass_power).sum((0, 1))
    return out, lse, mass


def kv_heads(query: Tensor, segments: Segments, chunk: Chunk | None, sink_logits: Tensor | None) -> Iterator[KVHead]:
    """Shapes as in `ragged_attention`."""
    num_kv_heads = len(segments) // query.shape[0]
    group = query.shape[1] // num_kv_heads
    for i, (start, length) in enumerate(segments.bounds()):
        b, h = divmod(i, num_kv_heads)
        q_heads, rows = slice(h * group, (h + 1) * group), slice(start, start + length)
        keys = segments.keys[rows]
        keys = keys if chunk is None else torch.cat([keys, chunk.key[b, h]])
        mask = None if chunk is None or chunk.mask is None else chunk.mask[b % len(chunk.mask), 0]
        yield KVHead(b, h, q_heads, rows, length, keys, mask, None if sink_logits is None else sink_logits[q_heads])


def _values(segments: Segments, chunk: Chunk | None, head: KVHead) -> Tensor:
    """[length + m, Dv]."""
    values = segments.values[head.rows]
    return values if chunk is None else torch.cat([values, chunk.value[head.b, head.h]])


def query_blocks(n: int, head: KVHead, entry_mask: Tensor | None = None) -> Iterator[tuple[slice, int, Tensor | None]]:
    """What `n` queries see of a segment's entries and then of the chunk's m tokens, in blocks of queries.

    entry_mask: bool [n, length]

    Yields the block's queries, the number of columns that matter to it, and bool [block, columns], None if all is seen.
    """
    length, m = head.length, len(head.keys) - head.length
    for begin in range(0, n, BLOCK):
        end = min(begin + BLOCK, n)
        tokens = m if head.mask is not None else min(max(end + m - n, 0), m)
        if entry_mask is None and tokens == 0:
            yield slice(begin, end), length, None
            continue
        visible = torch.ones(end - begin, length + tokens, dtype=torch.bool, device=head.keys.device)
        if entry_mask is not None:
            visible[:, :length] = entry_mask[begin:end]
        if head.mask is not None:
            visible[:, length:] = head.mask[begin:end]
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
