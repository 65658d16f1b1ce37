"""What a policy is given with a prompt: a first one, and a later chunk behind entries that were kept, in no order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvpolicy.plugins.activations import LayerActivations
from kvpolicy.plugins.roles import EvictionPolicy
from kvpolicy.testing.synthetic import SyntheticProbe

BATCH = 2
NUM_ABSENT = 5
_NUM_DECODED = 2
_ENTRY_AXIS = {
    "positions": 2,
    "scores": 2,
    "keys": 2,
    "values": 2,
    "window_attention": 2,
    "full_attention": 2,
    "repeat_attention": 2,
    "query_attention": 3,
}
_TOKEN_AXIS = {"queries": 2, "output": 2, "hidden_before": 1, "attention_input": 1, "hidden_after": 1, "rope": 1}


def first_prompt(policy: EvictionPolicy, layer: int, length: int) -> LayerActivations:
    """One layer over a batch of prompts, with what the policy requires: entries in order of position, all present."""
    requires = policy.requires - {"decode_attention"}
    return SyntheticProbe().activations(layer, requires=requires, batch_size=BATCH, length=length)


@dataclass(frozen=True, slots=True)
class LaterChunk:
    """A prompt's later chunk, after an eviction: entries in no order, with gaps between positions, then the chunk.

    Slots are reused, so the order of entries is not that of positions. Some entries are absent in KV head 0.

    length: entries that are scored;  chunk: how many of them are new
    """

    length: int
    chunk: int

    def __str__(self) -> str:
        return f"{self.length} entries, of them {NUM_ABSENT} absent in one KV head, the last {self.chunk} a new chunk"

    @property
    def positions(self) -> Tensor:
        """int64 `[B, H, n]`, -1 for absent entries."""
        heads, kept = SyntheticProbe().spec.num_kv_heads, self.length - self.chunk
        generator = torch.Generator().manual_seed(0)
        rows = [torch.randperm(3 * kept, generator=generator)[:kept] for _ in range(BATCH * heads)]
        chunk = torch.arange(3 * kept, 3 * kept + self.chunk)
        positions = torch.stack([torch.cat([row, chunk]) for row in rows]).reshape(BATCH, heads, self.length)
        positions[:, 0, 2 : 2 + NUM_ABSENT] = -1
        return positions

    @property
    def other_slots(self) -> Tensor:
        """int64 `[B, H, n]`: the same entries in other slots, by the slot that each has here. The chunk stays last."""
        batch, heads, length = self.positions.shape
        lots = torch.rand(batch, heads, length, generator=torch.Generator().manual_seed(3))
        lots[..., -self.chunk :] = torch.arange(1, self.chunk + 1)
        return lots.argsort(-1)

    def activations(self, policy: EvictionPolicy, layer: int, garbage: float = 0.0) -> LayerActivations:
        """What the policy requires.

        garbage: what the keys and values of absent entries hold, which is nobody's promise
        """
        changed = {
            name: self._later(name, value, policy, garbage)
            for name, value in first_prompt(policy, layer, self.length).supplied().items()
        }
        return LayerActivations(**changed)

    def _later(self, name: str, value: Any, policy: EvictionPolicy, garbage: float) -> Any:
        absent = self.positions < 0
        if name in _TOKEN_AXIS:
            return _last(value, _TOKEN_AXIS[name], self.chunk)
        if name == "positions":
            return self.positions
        if name == "scores":
            return self._scores(policy.new_entry_score)
        if name in ("keys", "values"):
            return value.masked_fill(absent[..., None], garbage)
        if name == "query_attention":
            return value.masked_fill(absent[:, :, None], 0.0)
        return value.masked_fill(absent, 0.0) if name in _ENTRY_AXIS else value

    def _scores(self, new_entry_score: float) -> Tensor:
        """float32 `[B, H, n]`: of scored entries, then of decoded ones; 0 for the chunk and for absent entries."""
        scores = torch.rand(self.positions.shape, generator=torch.Generator().manual_seed(2))
        scores[:, :, -self.chunk - _NUM_DECODED : -self.chunk] = new_entry_score
        scores[:, :, -self.chunk :] = 0.0
        return scores.masked_fill(self.positions < 0, 0.0)


def in_slots(activations: LayerActivations, slots: Tensor) -> LayerActivations:
    """The same entries in other slots. slots: int64 `[B, H, n]`, where each one was."""
    moved: Mapping[str, Any] = {
        name: _moved(value, slots, _ENTRY_AXIS[name])
        for name, value in activations.supplied().items()
        if name in _ENTRY_AXIS
    }
    return activations.replace(**moved)


def _moved(value: Tensor, slots: Tensor, axis: int) -> Tensor:
    for _ in range(2, axis):
        slots = slots[:, :, None]
    for _ in range(axis + 1, value.dim()):
        slots = slots[..., None]
    return value.gather(axis, slots.expand(value.shape))


def _last(value: Any, axis: int, count: int) -> Any:
    if isinstance(value, tuple):
        return tuple(_last(part, axis, count) for part in value)
    return value.narrow(axis, value.shape[axis] - count, count)
