"""What a layer's attention says about the layer, for allocators that split a budget at run time."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpolicy.cache.attention_mass import attention_of_each
from kvpolicy.cache.chunk import Chunk
from kvpolicy.cache.device_tables import on_device
from kvpolicy.cache.layer import StoreLayer
from kvpolicy.cache.scoring import Scoring
from kvpolicy.plugins.activations import LayerStatistics
from kvpolicy.plugins.roles import EvictionPolicy


def attention_statistics(
    requires: frozenset[str], policy: EvictionPolicy, layer: StoreLayer, query: Tensor, chunk: Chunk, scoring: Scoring
) -> LayerStatistics:
    """Of the attention that the entries in front of the observation window get from its queries.

    requires: names of `LayerStatistics`
    policy:   whose window it is
    query:    [B, num_q_heads, n, D] of the chunk's last n tokens
    """
    if not requires:
        return LayerStatistics()
    query = query[:, :, -policy.observation_window :]
    batch, heads, device = len(chunk.positions), layer.num_heads, layer.arena.device
    asking = chunk.positions[:, -query.shape[2] :] >= 0
    seen, count = chunk.positions.amax(1) + 1, asking.sum(1)
    begin, count, asks = on_device(seen - count, device), on_device(count, device), on_device(asking, device)
    positions = layer.candidates(chunk).view(batch, heads, -1)
    front = (positions >= 0) & (positions < begin[:, None, None])
    mass = attention_of_each(layer.arena, query, chunk, scoring.options()).masked_fill(~front[:, :, None], 0.0)
    mass = mass * (heads / query.shape[1])  # the mean over the query group
    per_query = 1 / count.clamp(min=1)[:, None]
    statistics = {}
    if "attention_entropy" in requires:
        statistics["attention_entropy"] = -torch.xlogy(mass, mass).sum((2, 3)) * per_query
    if "attention_variance" in requires:
        mean = mass.sum(2, keepdim=True) * per_query[..., None, None]
        squares = (mass - mean).square() * asks[:, None, :, None]
        statistics["attention_variance"] = squares.sum((2, 3)) * per_query
    return LayerStatistics(**statistics)
