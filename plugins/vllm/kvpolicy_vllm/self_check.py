"""At start, on the device, in the dtype and at the head size that are served: attention is what it must be."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from kvpolicy_vllm.attend import BlockAttention
from kvpolicy_vllm.layout import BlockLayout
from kvpolicy_vllm.steps import LayerTables

HEADS, GROUP, SINKS = 2, 2, 4
TOKENS, CHUNK = 96, 40  # a first chunk, one behind entries, and single tokens
SLOTS = (40, 9)


@functools.cache
def check_attention(device: torch.device, dtype: torch.dtype, dim: int) -> None:
    """Raises `RuntimeError` where it differs from a masked forward, or does not differ from a dense one.

    dim: of a head
    """
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(TOKENS, heads, dim, generator=generator).to(device, dtype)
        for heads in (HEADS * GROUP, HEADS, HEADS)
    )
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    for tokens_per_block in (TOKENS, 48):
        layout = BlockLayout.of(SLOTS, tokens_per_block, SINKS, max_tokens=TOKENS, device=device)
        out = _token_by_token(BlockAttention(layout, dim**-0.5), query, key, value)
        off = float((out - _masked(layout, query, key, value)).abs().max())
        if not off <= tolerance:
            raise RuntimeError(
                f"kvpolicy-vllm attends wrongly on {device} in {dtype}: {off:.2g} from a masked forward, where "
                f"{tolerance:g} is the most. Please report it with the versions of torch, triton and vllm"
            )
        if float((out - _masked(None, query, key, value)).abs().max()) < 0.1:
            raise RuntimeError("kvpolicy-vllm attends to everything, so that its budget is not applied")


def _token_by_token(attention: BlockAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Chunks, then single tokens, each with a row of no request beside it. Returns float32 [N, heads, D]."""
    layout, device, dim = attention.layout, query.device, query.shape[-1]
    cache = torch.zeros(layout.num_blocks + 1, layout.rows, 2, dim, device=device, dtype=query.dtype)
    blocks = torch.arange(layout.num_blocks, 0, -1, device=device)
    tables = LayerTables([layout], dim)
    parts = []
    for begin in (0, CHUNK):
        span = slice(begin, begin + CHUNK)
        parts.append(attention.chunk(query[span], key[span], value[span], cache, blocks, begin))
    for token in range(2 * CHUNK, TOKENS):
        counts = torch.tensor([token + 1, 0], device=device)
        both = torch.tensor([token, 0], device=device)
        (step,) = tables.step(torch.stack([blocks, blocks]), counts)
        parts.append(attention.decode(query[both], key[both], value[both], cache, step)[:1])
    return torch.cat(parts).float()


def _masked(layout: BlockLayout | None, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The definition, in float32; None sees everything."""
    at = torch.arange(TOKENS, device=query.device)
    mask = (at <= at[:, None]).expand(HEADS, -1, -1)
    if layout is not None:
        mask = mask & ((at < layout.num_sink_tokens) | (at >= layout.oldest(at)[:, :, None]))
    q, k, v = query.float().view(TOKENS, HEADS, GROUP, -1), key.float(), value.float()
    scores = torch.einsum("qhgd,khd->hgqk", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask[:, None], float("-inf")).softmax(-1)
    return torch.einsum("hgqk,khd->qhgd", weights, v).flatten(1, 2)
