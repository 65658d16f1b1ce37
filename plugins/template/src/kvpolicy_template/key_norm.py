"""Keep the entries whose keys are short: they tend to draw the most attention.

Source: "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression", arXiv:2406.11430. Different on
purpose: the paper leaves the first two layers uncompressed, here every budgeted layer is treated alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvpolicy import DecodeStep, EvictionPolicy, LayerActivations


@dataclass(frozen=True, slots=True)
class KeyNormPolicy(EvictionPolicy):
    """The score of an entry is minus the L2 norm of its key.

    num_sink_tokens: first positions that the cache never evicts
    recent_window:   last positions that the cache never evicts
    """

    requires: ClassVar[frozenset[str]] = frozenset({"keys", "positions"})

    num_sink_tokens: int = 4
    recent_window: int = 16

    def score_prompt(self, activations: LayerActivations) -> Tensor:
        absent = activations.positions < 0  # padding and empty slots: their keys may hold anything, NaN too
        return _score(activations.keys).masked_fill(absent, 0.0)

    def score_step(self, step: DecodeStep) -> Tensor:
        return _score(step.keys)


def _score(keys: Tensor) -> Tensor:
    """Minus the L2 norm over the last dimension, float32."""
    return -keys.float().square().sum(-1).sqrt()
