"""Entropy: how many entries a KV head needs to keep most of its attention.

Source: the LMBA of ZigZagKV, arXiv:2412.09036, the least budget of a layer that maintains its attention.
Reconstructed: the paper's body was not readable. The reading is that of a pull request to NVIDIA/kvpress (#238): the
attention of the last queries, its largest entries, a threshold of 0.9. Different on purpose:

- Counted for KV heads, which share their entries. The reading counts for query heads and takes the mean.
- Measured once, over the calibration prompts. The source measures every prompt that it answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvpolicy import Importance, ImportanceEstimator, LayerActivations, ModelProbe, PluginError


@dataclass(frozen=True, slots=True)
class EntropyEstimator(ImportanceEstimator):
    """Importance of a KV head = the smallest number of entries that keeps `mass` of its attention, mean over prompts.

    The attention is that of the last queries of a prompt, summed over them and over the query group. A head whose
    attention is spread needs many entries, a focused one few. The importance of a layer is the mean of its KV heads.

    mass: part of the attention that must stay, in (0, 1)
    observation_window: queries at the end of each prompt that are asked
    """

    requires: ClassVar[frozenset[str]] = frozenset({"window_attention"})

    mass: float = 0.9
    observation_window: int = 64

    def __post_init__(self) -> None:
        if not 0 < self.mass < 1 or self.observation_window < 1:
            raise PluginError(
                "entropy: mass must lie in (0, 1) and observation_window must be at least 1, got "
                f"{self.mass} and {self.observation_window}"
            )

    def estimate(self, probe: ModelProbe) -> Importance:
        counts: list[list[Tensor]] = [[] for _ in range(probe.spec.num_budgeted_layers)]

        def visit(activations: LayerActivations) -> None:
            counts[activations.layer].append(self._entries(activations.window_attention))

        probe.observe(visit, self.requires, observation_window=self.observation_window)
        if not all(counts):
            raise PluginError("entropy: the probe ran no prompt; it needs at least one")
        per_head = torch.stack([torch.stack(of_layer).mean(0) for of_layer in counts])
        return Importance(per_head=per_head, per_layer=per_head.mean(1))

    def _entries(self, attention: Tensor) -> Tensor:
        """attention: `[B, H, n]`. Returns `[H]` on the CPU, from 1 to n."""
        kept = attention.double().sort(-1, descending=True).values.cumsum(-1)
        short = (kept < self.mass * kept[..., -1:]).sum(-1)  # so many entries are not enough
        return (short + 1).float().mean(0).cpu()
