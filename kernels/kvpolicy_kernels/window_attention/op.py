"""Checks the arguments and picks the backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvpolicy_kernels.backend import Backend, uses_triton
from kvpolicy_kernels.window_attention.cpu import blocked_window_attention, growing_window_attention


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    capacities: Sequence[int] | Tensor,
    num_sink_tokens: int,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    prefill_length: int = 0,
    tokens_per_block: int | None = None,
    skipped: int = 0,
    backend: Backend = "auto",
) -> Tensor:
    """What each token would see if it were decoded with a cache of `capacities[h]` entries in KV head h.

    Token q of KV head h attends to token k iff
    `k <= q and (k < num_sink_tokens or k > q - (capacities[h] - num_sink_tokens) or q < prefill_length)`.

    With `tokens_per_block` the capacity grows by `capacities[h]` entries with every block of tokens that begins, and
    what was evicted before does not return: of the tokens besides the sinks, token q sees those from
    `num_sink_tokens + b * (tokens_per_block - capacities[h]) + max(0, q % tokens_per_block + 1 - capacities[h])` on,
    where b is `q // tokens_per_block`.

    query: [B, num_q_heads, n, D], of the last n tokens;  key: [B, num_kv_heads, T, D];  value: [B, num_kv_heads, T, Dv]
    capacities: num_kv_heads ints, each above `num_sink_tokens`; T or more means plain causal attention. A tensor on the
        device is not read back, nor checked
    scale: of the scores, default D ** -0.5;  softcap: scores become `softcap * tanh(score / softcap)`
    sink_logits: [num_q_heads], a learned logit that takes part in the softmax with a zero value (gpt-oss)
    prefill_length: queries before it attend densely; 0 with `tokens_per_block`
    skipped: with `tokens_per_block`, tokens behind the sinks that no query sees and that are left out: key and query i
        behind the sinks are token `i + skipped`
    backend: "auto" is Triton on CUDA and torch elsewhere

    Returns [B, num_q_heads, n, Dv]. Memory is O(T): no [heads, T, T] mask is made.
    Raises `ValueError` for shapes or capacities that do not fit, and for a backend that cannot run here.
    """
    _check(query, key, value, capacities, num_sink_tokens)
    if tokens_per_block is not None and prefill_length:
        raise ValueError(f"window_attention: prefill_length must be 0 with tokens_per_block, got {prefill_length}")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if uses_triton("window_attention", backend, query):
        from kvpolicy_kernels.window_attention.kernel import triton_window_attention

        table = capacities if isinstance(capacities, Tensor) else torch.tensor([int(c) for c in capacities])
        window = (table - num_sink_tokens).to(query.device, torch.int32)
        out: Tensor = triton_window_attention(
            query, key, value, window, num_sink_tokens, scale, softcap, sink_logits, prefill_length, tokens_per_block,
            skipped,
        )  # fmt: skip
        return out
    if isinstance(capacities, Tensor):
        capacities = capacities.tolist()
    if tokens_per_block is not None:
        return growing_window_attention(
            query, key, value, capacities, num_sink_tokens, scale, softcap, sink_logits, tokens_per_block, skipped
        )
    return blocked_window_attention(
        query, key, value, capacities, num_sink_tokens, scale, softcap, sink_logits, prefill_length
    )


def _check(query: Tensor, key: Tensor, value: Tensor, capacities: Sequence[int] | Tensor, num_sink_tokens: int) -> None:
    batch, num_q_heads, count, dim = query.shape
    num_kv_heads, length = key.shape[1:3]
    if key.shape != (batch, num_kv_heads, length, dim) or value.shape[:3] != key.shape[:3] or length < count:
        raise ValueError(
            f"window_attention: query {list(query.shape)} needs key [{batch}, heads, T, {dim}] and value "
            f"[{batch}, heads, T, dim] of a T of at least {count}, got {list(key.shape)} and {list(value.shape)}"
        )
    if num_q_heads % num_kv_heads:
        raise ValueError(f"window_attention: {num_q_heads} query heads are no multiple of {num_kv_heads} KV heads")
    if isinstance(capacities, Tensor) and capacities.device.type != "cpu" and capacities.shape == (num_kv_heads,):
        return
    if len(capacities) != num_kv_heads or min(capacities) <= num_sink_tokens:
        raise ValueError(
            f"window_attention: expected {num_kv_heads} capacities above num_sink_tokens = {num_sink_tokens}, "
            f"got {len(capacities)} from {min(capacities)}"
        )
