"""`window_attention` over a cache of codes: torch, in blocks of queries that see a key exactly, or decoded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvpolicy_kernels.formats import EntryFormat, rounded
from kvpolicy_kernels.key_centre import KeyCentre
from kvpolicy_kernels.window_attention.cpu import BLOCK, Attend

_BLOCKS = {"cpu": BLOCK, "cuda": 1024}
"""Queries of a block. A GPU would wait for Python at a CPU's."""


def coded_window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    capacities: Sequence[int],
    num_sink_tokens: int,
    entry_format: EntryFormat,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    prefill_length: int = 0,
    key_centre: KeyCentre | None = None,
) -> Tensor:
    """What each token would see if it were decoded with a cache of `capacities[h]` entries in this format.

    As `window_attention`, of as many queries as tokens. A query sees the sink tokens and the last `exact_recent`
    tokens, itself included, as they are, and all others as their codes say; all of them where `exact_recent` is 0.
    Queries before `prefill_length` attend densely, to what is not encoded yet.

    capacities: each at least `num_sink_tokens + exact_recent`
    key_centre: what a format that is centred encodes keys less of
    """
    group = query.shape[1] // key.shape[1]
    out = query.new_empty(*query.shape[:3], value.shape[-1])
    centre = None if key_centre is None else key_centre.along(key.shape[2])
    exact, coded = (key, value), (rounded(key, entry_format, centre), rounded(value, entry_format))
    for head, capacity in enumerate(capacities):
        heads, own = slice(head * group, (head + 1) * group), slice(head, head + 1)
        sinks = None if sink_logits is None else sink_logits[heads]
        attend = Attend(query.shape[-1] ** -0.5 if scale is None else scale, softcap, sinks)
        q, o = query[:, heads], out[:, heads]
        states = [(x[:, own], y[:, own]) for x, y in zip(coded, exact, strict=True)]
        first = max(prefill_length, 1)  # a first token is a prompt of one
        k, v = (x[:, :, :first] for _, x in states)
        attend.causal(q[:, :, :first], k, v, o[:, :, :first])
        _windows(attend, q, states, o, first, int(capacity) - num_sink_tokens, num_sink_tokens, entry_format)
    return out


def _windows(
    attend: Attend,
    q: Tensor,
    states: Sequence[tuple[Tensor, Tensor]],
    out: Tensor,
    first: int,
    window: int,
    num_sinks: int,
    entry_format: EntryFormat,
) -> None:
    """Fills `out` from token `first` on. q, out: [B, group, T, D];  states: keys and values, decoded and exact"""
    length, recent = q.shape[2], entry_format.exact_recent
    block = _BLOCKS.get(q.device.type, BLOCK)
    for begin in range(first, length, block):
        end = min(begin + block, length)
        token = torch.arange(end, device=q.device)
        query = token[begin:, None]
        visible = (token <= query) & ((token < num_sinks) | (token > query - window))
        is_exact = visible & ((token < num_sinks) | (token > query - recent)) & (recent > 0)
        parts = [visible & ~is_exact, is_exact]
        columns = [part.any(0).nonzero()[:, 0] for part in parts]
        mask = torch.cat([part[:, used] for part, used in zip(parts, columns, strict=True)], 1)
        bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, float("-inf"))
        k, v = (torch.cat([x[:, :, used] for x, used in zip(pair, columns, strict=True)], 2) for pair in states)
        out[:, :, begin:end] = attend.masked(q[:, :, begin:end], k, v, bias)
