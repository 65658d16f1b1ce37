"""What a store hands to a policy with a prompt or a chunk of one: for each source the function that makes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kvpolicy.cache.arena import LayerArena
from kvpolicy.cache.attention_mass import attention_mass, attention_of_each
from kvpolicy.cache.chunk import Chunk
from kvpolicy.cache.device_tables import on_device
from kvpolicy.cache.layer import StoreLayer
from kvpolicy.plugins import plugin_call
from kvpolicy.plugins.roles import EvictionPolicy


@dataclass(frozen=True)
class Candidates:
    """The entries of a layer and the tokens of a chunk, which a policy is to score together.

    layer:   its table is that of the tokens seen with this chunk
    query:   [B, num_q_heads, n, D] of the chunk's last n tokens
    options: scale, softcap, sink_logits, power
    """

    policy: EvictionPolicy
    layer: StoreLayer
    query: Tensor
    chunk: Chunk
    options: Mapping[str, Any]

    @property
    def arena(self) -> LayerArena:
        return self.layer.arena

    @cached_property
    def entries(self) -> tuple[Tensor, Tensor]:
        """The row of each entry, int64 [S, width], any where there is none, and where that is, bool [S, width]."""
        arena, device = self.arena, self.arena.device
        column = torch.arange(arena.width, device=device)
        start, length = on_device(torch.stack([arena.start, arena.length])[..., None], device)
        return (start + column).clamp(max=len(arena.positions) - 1), column >= length

    @property
    def last_queries(self) -> Tensor:
        """Those of the observation window."""
        return self.query[:, :, -self.policy.observation_window :]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, H, width + n)."""
        batch, heads = self.chunk.key.shape[:2]
        return batch, heads, self.arena.width + len(self.chunk)

    def supplied(self) -> dict[str, Any]:
        """What the policy requires of a store, by name."""
        return {name: SUPPLIERS[name](self) for name in self.policy.requires & SUPPLIERS.keys()}

    def with_chunk(self, column: Tensor, fresh: Tensor) -> Tensor:
        """A copy of an arena's column and of tokens, [B, H, width + n, dim]; zeros where an entry is absent."""
        if not self.arena.width:
            return fresh.detach().clone()
        rows, absent = self.entries
        own = column[rows].masked_fill(absent[..., None], 0)
        return torch.cat([own.view(*fresh.shape[:2], *own.shape[1:]), fresh], 2)


def _positions(of: Candidates) -> Tensor:
    return of.layer.candidates(of.chunk).view(*of.chunk.key.shape[:2], -1)


def _scores(of: Candidates) -> Tensor:
    assert of.arena.scores is not None  # the store asks only where entries are scored
    fresh = torch.zeros(*of.chunk.key.shape[:3], 1, device=of.arena.device)
    return of.with_chunk(of.arena.scores[:, None], fresh)[..., 0]


def _scale(of: Candidates) -> float:
    scale: float | None = of.options.get("scale")
    return of.query.shape[-1] ** -0.5 if scale is None else scale


SUPPLIERS: dict[str, Callable[[Candidates], Any]] = {
    "positions": _positions,
    "scores": _scores,
    "keys": lambda of: of.with_chunk(of.arena.vectors[0], of.chunk.key),
    "values": lambda of: of.with_chunk(of.arena.vectors[1], of.chunk.value),
    "queries": lambda of: plugin_call.lent(of.query),
    "scale": _scale,
    "capacity": lambda of: on_device(of.layer.table, of.arena.device).clone(),
    "query_attention": lambda of: attention_of_each(of.arena, of.last_queries, of.chunk, of.options),
    "window_attention": lambda of: attention_mass(of.arena, of.last_queries, of.chunk, of.options),
    "full_attention": lambda of: attention_mass(of.arena, of.query, of.chunk, of.options),
}
"""Of each source that the table of sources says a store supplies with a prompt."""
