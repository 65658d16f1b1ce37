"""Random: keep entries by lot. The control: a method that does not beat it has learned nothing about entries.

No paper; NVIDIA/kvpress has a random press too. Different on purpose: the lots follow from (seed, layer, KV head,
position) and are not drawn, so that an entry has the same score in every later chunk, alone or in a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvpolicy import EvictionPolicy, LayerActivations


@dataclass(frozen=True, slots=True)
class RandomPolicy(EvictionPolicy):
    """The score of an entry is a hash of (seed, layer, KV head, position), uniform in [0, 1).

    It is the same in every row of a batch, after every chunk, on every device. Decoded tokens are left alone until
    the next chunk scores them.

    seed:            another seed, other lots
    num_sink_tokens: first positions that are never evicted; without them a lot would measure lost sink tokens alone
    recent_window:   last positions that are never evicted
    """

    requires: ClassVar[frozenset[str]] = frozenset({"positions"})

    seed: int = 0
    num_sink_tokens: int = 4
    recent_window: int = 0

    def score_prompt(self, activations: LayerActivations) -> Tensor:
        assert activations.positions is not None  # `requires` lists it
        positions = activations.positions.long()
        heads = torch.arange(positions.shape[1], device=positions.device)[:, None]
        lots = _mixed(positions ^ _mixed(heads ^ _mixed(torch.full_like(heads, activations.layer) ^ _start(self.seed))))
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
