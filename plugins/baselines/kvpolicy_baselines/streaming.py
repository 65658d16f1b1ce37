"""StreamingLLM's rule: keep the first tokens and the most recent ones.

Source: StreamingLLM, arXiv:2309.17453; mit-han-lab/streaming-llm, `StartRecentKVCache` (4 sink tokens). Different
on purpose: keys keep their original positions, they are not re-rotated to positions inside the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvpolicy import EvictionPolicy, LayerActivations


@dataclass(frozen=True, slots=True)
class StreamingPolicy(EvictionPolicy):
    """Scores an entry by its position; the cache protects the `num_sink_tokens` first positions."""

    window_rule: ClassVar[bool] = True
    requires: ClassVar[frozenset[str]] = frozenset({"positions"})

    num_sink_tokens: int = 4

    def score_prompt(self, activations: LayerActivations) -> Tensor:
        return activations.positions.to(torch.float32)
