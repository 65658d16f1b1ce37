"""The torch path: query blocks over sliced keys, so that the cost falls with the window.

Queries before `capacity` (nothing is evicted yet) and before `prefill_length` are plain causal attention. After
them every block of 128 queries sees the sinks and `window + 127` keys, under one mask that all blocks share.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kvpolicy_kernels.window_attention.reference import oldest_seen

BLOCK = 128  # of 64, 128 and 256 the fastest on CPUs at contexts 1024 to 4096, windows of 10 to 50 %


def blocked_window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    capacities: Sequence[int],
    num_sink_tokens: int,
    scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
    prefill_length: int,
) -> Tensor:
    """Shapes as in `window_attention`."""
    batch, num_q_heads, count, _ = query.shape
    group, length = num_q_heads // key.shape[1], key.shape[2]
    before = length - count  # tokens that do not ask
    out = query.new_empty(batch, num_q_heads, count, value.shape[-1])
    for head, capacity in enumerate(capacities):
        heads = slice(head * group, (head + 1) * group)
        sinks = None if sink_logits is None else sink_logits[heads]
        attend = Attend(scale, softcap, sinks)
        q, o = query[:, heads], out[:, heads]
        k, v = key[:, head : head + 1], value[:, head : head + 1]
        dense = min(max(int(capacity), prefill_length), length)
        if before < dense:
            some = slice(dense - before)
            attend.causal(q[:, :, some], k[:, :, :dense], v[:, :, :dense], o[:, :, some])
        if dense < length:
            _windows(attend, q, k, v, o, max(dense, before), int(capacity) - num_sink_tokens, num_sink_tokens)
    return out


def growing_window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    capacities: Sequence[int],
    num_sink_tokens: int,
    scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
    tokens_per_block: int,
    skipped: int,
) -> Tensor:
    """Shapes as in `window_attention`. Here each block of queries has a mask of its own."""
    group, length = query.shape[1] // key.shape[1], key.shape[2]
    before = length - query.shape[2]
    out = query.new_empty(*query.shape[:3], value.shape[-1])
    column = torch.arange(length, device=query.device)
    for head, capacity in enumerate(capacities):
        heads, own = slice(head * group, (head + 1) * group), slice(head, head + 1)
        attend = Attend(scale, softcap, None if sink_logits is None else sink_logits[heads])
        oldest = oldest_seen(column + skipped, capacity, num_sink_tokens, tokens_per_block) - skipped
        for begin in range(before, length, BLOCK):
            end = min(begin + BLOCK, length)
            first = min(max(int(oldest[begin]), num_sink_tokens), end)
            used = torch.cat([column[: min(num_sink_tokens, end)], column[first:end]])
            seen = (used <= column[begin:end, None]) & ((used < num_sink_tokens) | (used >= oldest[begin:end, None]))
            mask = query.new_zeros(seen.shape).masked_fill_(~seen, float("-inf"))
            some = slice(begin - before, end - before)
            k, v = key[:, own, used], value[:, own, used]
            out[:, heads, some] = attend.masked(query[:, heads, some], k, v, mask)
    return out


def _windows(
    attend: Attend, q: Tensor, k: Tensor, v: Tensor, out: Tensor, first: int, window: int, num_sinks: int
) -> None:
    """Fills `out` from token `first` on. q, out: [B, group, n, D], of the last n tokens; k, v: [B, 1, T, D]."""
    length = k.shape[2]
    before = length - q.shape[2]
    mask = _block_mask(window, num_sinks, q)
    for begin in range(first, length, BLOCK):
        end = min(begin + BLOCK, length)
        oldest = begin - window + 1
        keys = torch.cat([k[:, :, :num_sinks], k[:, :, oldest:end]], dim=2)
        values = torch.cat([v[:, :, :num_sinks], v[:, :, oldest:end]], dim=2)
        some = slice(begin - before, end - before)
        out[:, :, some] = attend.masked(q[:, :, some], keys, values, mask[: end - begin, : keys.shape[2]])


def _block_mask(window: int, num_sinks: int, like: Tensor) -> Tensor:
    """Additive mask [BLOCK, num_sinks + window + BLOCK - 1]: row i sees the sinks and columns i to i + window - 1."""
    row = torch.arange(BLOCK, device=like.device)[:, None]
    column = torch.arange(-num_sinks, window + BLOCK - 1, device=like.device)[None, :]
    visible = (column < 0) | ((column >= row) & (column < row + window))
    return torch.zeros(visible.shape, dtype=like.dtype, device=like.device).masked_fill_(~visible, float("-inf"))


class Attend:
    """Attention of one KV head's query group; SDPA, or plain products where SDPA cannot (softcap, learned sinks)."""

    def __init__(self, scale: float, softcap: float | None, sinks: Tensor | None) -> None:
        self.scale, self.softcap, self.sinks = scale, softcap, sinks
        self.stock = softcap is None and sinks is None

    def causal(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        """q, out: [B, group, n, D], of the last n tokens; k, v: [B, 1, m, D]."""
        before = k.shape[2] - q.shape[2]
        if self.stock and before == 0:
            group = q.shape[1]
            k, v = k.expand(-1, group, -1, -1), v.expand(-1, group, -1, -1)
            out.copy_(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale))
            return
        for begin in range(before, k.shape[2], BLOCK):
            end = min(begin + BLOCK, k.shape[2])
            some = slice(begin - before, end - before)
            mask = torch.full((end - begin, end), float("-inf"), dtype=q.dtype, device=q.device).triu_(begin + 1)
            out[:, :, some] = self.masked(q[:, :, some], k[:, :, :end], v[:, :, :end], mask)

    def masked(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """q: [B, group, n, D]; k, v: [B, 1, m, D]; mask: additive [n, m]. Returns [B, group, n, Dv]."""
        if self.stock:
            group = q.shape[1]
            k, v = k.expand(-1, group, -1, -1), v.expand(-1, group, -1, -1)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        scores = (q @ k.transpose(-1, -2)).float() * self.scale
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        scores = scores + mask
        if self.sinks is not None:
            column = self.sinks.float()[None, :, None, None].expand(*scores.shape[:3], 1)
            return torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1].to(v.dtype) @ v
        return torch.softmax(scores, -1).to(v.dtype) @ v
