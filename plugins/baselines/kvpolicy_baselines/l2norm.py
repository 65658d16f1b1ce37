"""L2 norm: keep the entries with the shortest keys.

Source: "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression", arXiv:2406.11430;
alessiodevoto/l2compress, cache.py. Different on purpose:

- The source leaves the layers that it skips as they are. A capacity is the allocator's and holds in every layer: in a
  skipped one the most recent entries are kept, whatever the norms.
- When to begin is the cache's `min_tokens`; in the source it is `prune_after`, 2048 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvpolicy import DecodeStep, EvictionPolicy, LayerActivations, PluginError


@dataclass(frozen=True, slots=True)
class L2NormPolicy(EvictionPolicy):
    """The score of an entry is minus the L2 norm of its key, after RoPE, which leaves the norm as it is.

    Short keys tend to draw much attention, and the norm needs no queries. Decoded tokens compete as those of a prompt
    do. The first layers are not scored by norm: they keep the most recent entries.

    num_skipped_layers: first budgeted layers that keep the most recent; the source skips layers 0 and 1
    num_sink_tokens:    first positions that are never evicted
    recent_window:      last positions that are never evicted
    """

    requires: ClassVar[frozenset[str]] = frozenset({"keys", "positions"})

    num_skipped_layers: int = 2
    num_sink_tokens: int = 0
    recent_window: int = 0

    def __post_init__(self) -> None:
        if self.num_skipped_layers < 0:
            raise PluginError(f"l2norm: num_skipped_layers must be at least 0, got {self.num_skipped_layers}")

    def score_prompt(self, activations: LayerActivations) -> Tensor:
        if activations.layer < self.num_skipped_layers:
            return activations.positions.float()
        absent = activations.positions < 0  # their keys may hold anything, NaN too
        return _score(activations.keys).masked_fill(absent, 0.0)

    def score_step(self, step: DecodeStep) -> Tensor:
        if step.layer < self.num_skipped_layers:
            return step.positions.float()
        return _score(step.keys)


def _score(keys: Tensor) -> Tensor:
    """Minus the L2 norm over the last dimension, float32."""
    return -keys.float().square().sum(-1).sqrt()
