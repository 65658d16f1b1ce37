"""SnapKV: keep what the last queries of the prompt attend to, in clusters.

Source: SnapKV, arXiv:2404.14469; FasterDecoding/SnapKV, snapkv/monkeypatch/snapkv_utils.py. Different on purpose:

- Under grouped-query attention a KV head pools the sum over its query heads; the source repeats the KV heads, pools and
  chooses for each query head.
- Neighbours are neighbours by position. In a cache that has evicted, a position that is not held counts as 0, as the
  source's padding does at the ends.
- The source keeps every decoded token. Here the capacity holds: decoded tokens are kept before those of the prompt, and
  those of the observation window before the rest of it.
- The window of a prompt shorter than `observation_window`, or of a short later chunk, is what there is of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvpolicy import EvictionPolicy, LayerActivations, PluginError
from kvpolicy_baselines.pooling import Pooling, pooled


@dataclass(frozen=True, slots=True)
class SnapKVPolicy(EvictionPolicy):
    """An entry's score is the attention of the last queries, summed, then pooled over its neighbours.

    Pooling keeps the surroundings of what is attended to. The window itself is not pooled; it is kept as the
    `recent_window`, and a capacity has to be larger than it for the scores to matter.

    kernel_size: positions that are pooled, odd; 1 pools nothing
    pooling:     "avg" or "max"
    observation_window: queries at the end of a prompt that are asked
    recent_window:      last positions that are never evicted; in the source the same number
    num_sink_tokens:    first positions that are never evicted; the source protects none
    """

    requires: ClassVar[frozenset[str]] = frozenset({"window_attention", "positions"})

    kernel_size: int = 5
    pooling: Pooling = "avg"
    observation_window: int = 32
    recent_window: int = 32
    num_sink_tokens: int = 0

    def __post_init__(self) -> None:
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise PluginError(f"snapkv: kernel_size must be odd and at least 1, got {self.kernel_size}")
        if self.pooling not in ("avg", "max"):
            raise PluginError(f"snapkv: pooling must be avg or max, got '{self.pooling}'")
        if self.observation_window < 1:
            raise PluginError(f"snapkv: observation_window must be at least 1, got {self.observation_window}")

    def score_prompt(self, activations: LayerActivations) -> Tensor:
        mass, positions = activations.window_attention, activations.positions
        window = positions > positions.amax((1, 2), keepdim=True) - self.observation_window
        scores = pooled(mass.float().masked_fill(window, 0.0), positions, self.kernel_size, self.pooling)
        best = scores.masked_fill(window, 0.0).amax(2, keepdim=True)
        return torch.where(window, best, scores)  # the last of the prompt to go in decoding: ties keep the more recent
