"""At start, on the device, in the dtype and at the head size that are served: attention is what it must be."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from kvpolicy import EvictionPolicy, LayerActivations
from kvpolicy_vllm.attend import BlockAttention
from kvpolicy_vllm.cuts import CutAttention, CutLayout
from kvpolicy_vllm.layout import BlockLayout
from kvpolicy_vllm.observation import Observation
from kvpolicy_vllm.steps import LayerTables

HEADS, GROUP, SINKS = 2, 2, 4
TOKENS = 96
SLOTS = (40, 9)


@functools.cache
def check_attention(device: torch.device, dtype: torch.dtype, dim: int) -> None:
    """Raises `RuntimeError` where it differs from a masked forward, or does not differ from a dense one.

    dim: of a head
    """
    inputs = _inputs(TOKENS, device, dtype, dim)
    at = torch.arange(TOKENS, device=device)
    for tokens_per_block in (TOKENS, 48):
        layout = BlockLayout.of(SLOTS, tokens_per_block, SINKS, max_tokens=TOKENS, device=device)
        out = _token_by_token(BlockAttention(layout, dim**-0.5), *inputs)
        _compare(out, (at < SINKS) | (at >= layout.oldest(at)[:, :, None]), inputs)


@functools.cache
def check_cuts(device: torch.device, dtype: torch.dtype, dim: int, policy: EvictionPolicy, layer: int) -> None:
    """Likewise of heads that are cut back by a content policy, in a layer that it scores.

    Of two scores that are nearly equal another device may drop the other entry, so that one of two draws is enough.
    """
    try:
        _check_cuts(device, dtype, dim, policy, layer, 0)
    except RuntimeError:
        _check_cuts(device, dtype, dim, policy, layer, 1)


def _check_cuts(
    device: torch.device, dtype: torch.dtype, dim: int, policy: EvictionPolicy, layer: int, seed: int
) -> None:
    window = policy.observation_window if "window_attention" in policy.requires else 0
    period = max(16, 1 << (window - 1).bit_length()) if window else 16
    least = policy.num_sink_tokens + policy.recent_window + 2 * period
    slots, tokens = [least, least + period + 5], least + 4 * period + 7
    rows, observation = sum(slots), None
    if window:
        rows += Observation.size(slots, window, HEADS * GROUP, dim)
        observation = Observation.behind(slots, rows, window, HEADS * GROUP, dim, device)
    plain = BlockLayout.of(slots, tokens, policy.num_sink_tokens, max_tokens=tokens, rows=rows, device=device)
    layout = CutLayout.every(period, plain, observation)
    inputs = _inputs(tokens, device, dtype, dim, seed)
    attention = CutAttention(layout=layout, scale=dim**-0.5, policy=policy, layer=layer)
    seen = [_seen(policy, layer, head, inputs, capacity, period) for head, capacity in enumerate(slots)]
    _compare(_token_by_token(attention, *inputs), torch.stack(seen).to(device), inputs)


def _inputs(tokens: int, device: torch.device, dtype: torch.dtype, dim: int, seed: int = 0) -> list[Tensor]:
    """Queries, keys and values [N, heads, dim]."""
    generator = torch.Generator().manual_seed(seed)
    heads = (HEADS * GROUP, HEADS, HEADS)
    return [torch.randn(tokens, count, dim, generator=generator).to(device, dtype) for count in heads]


def _compare(out: Tensor, seen: Tensor, inputs: list[Tensor]) -> None:
    """out: float32 [N, heads, dim];  seen: bool [HEADS, N, N], what each token is to see of the tokens up to itself"""
    device, dtype = inputs[0].device, inputs[0].dtype
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    off = float((out - _masked(seen, *inputs)).abs().max())
    if not off <= tolerance:
        raise RuntimeError(
            f"kvpolicy-vllm attends wrongly on {device} in {dtype}: {off:.2g} from a masked forward, where "
            f"{tolerance:g} is the most. Please report it with the versions of torch, triton and vllm"
        )
    if float((out - _masked(torch.ones_like(seen), *inputs)).abs().max()) < 0.1:
        raise RuntimeError("kvpolicy-vllm attends to everything, so that its budget is not applied")


def _token_by_token(attention: BlockAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Chunks, then single tokens, each with a row of no request beside it. Returns float32 [N, heads, D]."""
    layout, device, dim = attention.layout, query.device, query.shape[-1]
    cache = torch.zeros(layout.num_blocks + 1, layout.rows, 2, dim, device=device, dtype=query.dtype)
    blocks = torch.arange(layout.num_blocks, 0, -1, device=device)
    observation = layout.observation if isinstance(layout, CutLayout) else None
    tables = LayerTables([layout], dim, [observation] if observation else [])
    chunk = len(query) * 5 // 12  # a first one, one behind entries, and single tokens
    parts = []
    for begin in (0, chunk):
        span = slice(begin, begin + chunk)
        parts.append(attention.chunk(query[span], key[span], value[span], cache, blocks, begin))
    for token in range(2 * chunk, len(query)):
        if isinstance(attention, CutAttention):
            attention.cut(cache, blocks, token)
        counts = torch.tensor([token + 1, 0], device=device)
        both = torch.tensor([token, 0], device=device)
        (step,) = tables.step(torch.stack([blocks, blocks]), counts)
        parts.append(attention.decode(query[both], key[both], value[both], cache, step)[:1])
    return torch.cat(parts).float()


def _masked(seen: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The definition, in float32."""
    tokens = len(query)
    mask = seen & torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()
    q, k, v = query.float().view(tokens, HEADS, GROUP, -1), key.float(), value.float()
    scores = torch.einsum("qhgd,khd->hgqk", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask[:, None], float("-inf")).softmax(-1)
    return torch.einsum("hgqk,khd->qhgd", weights, v).flatten(1, 2)


def _seen(policy: EvictionPolicy, layer: int, head: int, inputs: list[Tensor], capacity: int, period: int) -> Tensor:
    """Which tokens each token sees under a list of them that is cut, bool [N, N] on the CPU."""
    query, keys = inputs[0].float().cpu()[:, head * GROUP : (head + 1) * GROUP], inputs[1].float().cpu()[:, head]
    at = torch.arange(len(keys))
    seen = torch.zeros(len(keys), len(keys), dtype=torch.bool)
    kept = at[:0]
    for token in range(len(keys)):
        if token % period == 0 and len(kept) > capacity - period:
            sources: dict[str, Any] = {"keys": keys[None, None, kept], "positions": kept[None, None]}
            if "window_attention" in policy.requires:
                asked = at[token - policy.observation_window : token]
                logits = torch.einsum("qgd,kd->gqk", query[asked], keys[kept]) * keys.shape[-1] ** -0.5
                weights = logits.masked_fill(kept > asked[:, None], float("-inf")).softmax(-1)
                sources["window_attention"] = weights.sum((0, 1))[None, None]
            scores = policy.score_prompt(LayerActivations(layer, **sources))[0, 0]
            pinned = (kept < policy.num_sink_tokens) | (kept >= token - policy.recent_window)
            order = scores.masked_fill(pinned, float("inf")).sort(stable=True).indices  # of equal ones the older goes
            kept = kept[order[len(kept) - capacity + period :].sort().values]
        kept = torch.cat([kept, at[token : token + 1]])
        seen[token, kept] = True
    return seen
