"""Who would be evicted when: what a prompt that is held whole tells of every budget."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpolicy.cache.device_tables import on_device
from kvpolicy.cache.layer import StoreLayer
from kvpolicy.cache.select import ranking


def outliving(layer: StoreLayer) -> Tensor:
    """int64 [S, seen], by position: how many entries that may be evicted outlive this one; -1 where it never is.

    For a layer that has evicted nothing.
    """
    arena, protection = layer.arena, layer.protection
    positions, settled = arena.padded_positions(), layer.settled.repeat_interleave(layer.num_heads)[:, None]
    keys = ranking(arena.padded_scores(), positions, on_device(settled, arena.device), protection)
    pinned, order = protection.pinned(positions), keys.argsort(1, descending=True)
    place = torch.arange(order.shape[1], device=order.device)
    rank = torch.empty_like(order).scatter_(1, order, place.expand_as(order))
    rank = (rank - pinned.sum(1, keepdim=True)).masked_fill(pinned, -1)
    return torch.empty_like(rank).scatter_(1, positions, rank)
