"""The definition: dense scores and one mask per KV head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def window_mask(
    capacities: Sequence[int],
    num_sink_tokens: int,
    length: int,
    prefill_length: int = 0,
    tokens_per_block: int | None = None,
    skipped: int = 0,
) -> Tensor:
    """Returns bool [num_kv_heads, length, length], True where query (row) sees key (column)."""
    q = torch.arange(length)[None, :, None]
    k = torch.arange(length)[None, None, :]
    table = torch.tensor(list(capacities))[:, None, None]
    if tokens_per_block is None:
        oldest = q - (table - num_sink_tokens) + 1
    else:
        oldest = oldest_seen(q + skipped, table, num_sink_tokens, tokens_per_block) - skipped
    return (k <= q) & ((k < num_sink_tokens) | (k >= oldest) | (q < prefill_length))


def oldest_seen(tokens: Tensor, capacities: Tensor | int, num_sink_tokens: int, tokens_per_block: int) -> Tensor:
    """The oldest token besides the sinks that each token sees, where capacities grow. Shapes broadcast.

    A new block is filled before a token is evicted again; then each token takes the place of the oldest one.
    """
    number = tokens // tokens_per_block
    evicted = (tokens % tokens_per_block + 1 - capacities).clamp(min=0)  # in its own block
    return num_sink_tokens + number * (tokens_per_block - capacities) + evicted


def reference_window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    capacities: Sequence[int],
    num_sink_tokens: int,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    prefill_length: int = 0,
    tokens_per_block: int | None = None,
    skipped: int = 0,
) -> Tensor:
    """Shapes as in `window_attention`; computed in the dtype of the arguments."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.transpose(-1, -2) * scale  # [B, Hq, n, T]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    length = key.shape[2]
    mask = window_mask(capacities, num_sink_tokens, length, prefill_length, tokens_per_block, skipped)
    mask = mask[:, length - query.shape[2] :].to(query.device)
    scores = scores.masked_fill(~mask.repeat_interleave(group, 0), float("-inf"))
    if sink_logits is not None:
        column = sink_logits.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        return torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1] @ value
    return torch.softmax(scores, -1) @ value
