"""Random: keep entries at random. The control: a method that does not beat it has learned nothing about entries.

No paper; NVIDIA/kvpress has a random press too. Different on purpose: the lots follow from (seed, layer, KV head,
position) and are not drawn, so that an entry has the same score in every later chunk, alone or in a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvpolicy import DecodeStep, EvictionPolicy, LayerActivations


@dataclass(frozen=True, slots=True)
class RandomPolicy(EvictionPolicy):
    """The score of an entry is a hash of (seed, layer, KV head, position), uniform in [0, 1).

    It is the same in every row of a batch, in a chunk and decoded, on every device.

    seed:            another seed, other lots
    num_sink_tokens: first positions that are never evicted; without them a lot would measure lost sink tokens alone
    recent_window:   last positions that are never evicted
    """

    requires: ClassVar[frozenset[str]] = frozenset({"positions"})

    seed: int = 0
    num_sink_tokens: int = 4
    recent_window: int = 0

    def score_prompt(self, activations: LayerActivations) -> Tensor:
        heads = torch.arange(activations.positions.shape[1], device=activations.positions.device)
        return self._lots(activations.layer, heads[:, None], activations.positions)

    def score_step(self, step: DecodeStep) -> Tensor:
        return self._lots(step.layer, step.segment % step.num_kv_heads, step.positions)

    def _lots(self, layer: int, heads: Tensor, positions: Tensor) -> Tensor:
        """Float32. heads: int64, positions: int; broadcast against each other."""
        of_layer = _mixed(torch.full_like(heads, layer) ^ _start(self.seed))
        lots = _mixed(positions.long() ^ _mixed(heads ^ of_layer))
        return (lots & 0xFFFFFF).float() / 2**24  # 24 bits are exact in float32


def _start(seed: int) -> int:
    """32 bits of a seed of any size."""
    return seed * 0x9E3779B1 & 0xFFFFFFFF


def _mixed(bits: Tensor) -> Tensor:
    """A bijection of 32 bits, int64 in and out, in which each bit of the input moves about half of the output's."""
    bits = bits & 0xFFFFFFFF
    for factor, shift in ((0x7FEB352D, 16), (0x046CA68B, 15)):  # below 2**31: products of 32 bits stay in int64
        bits = ((bits ^ (bits >> shift)) * factor) & 0xFFFFFFFF
    return bits ^ (bits >> 16)
