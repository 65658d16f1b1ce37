"""TOVA: keep what the last query attends to.

Source: "Transformers are Multi-State RNNs", arXiv:2401.06104; schwartz-lab-NLP/TOVA, src/tova_cache.py.
Different on purpose:

- The source keeps one set of tokens in a layer. Here the heads of a layer have one score for a token, and each keeps as
  many as its own capacity allows: equal capacities give one set, others sets inside each other.
- In decoding the worst entry makes room before the new token attends, so a capacity of `c` here is a cache size of
  `c - 1` in the source, which attends over one entry more than it keeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvpolicy import DecodeStep, EvictionPolicy, LayerActivations


@dataclass(frozen=True, slots=True)
class TOVAPolicy(EvictionPolicy):
    """A token's score is the attention that the last query pays it, averaged over the KV heads of the layer.

    A KV head's attention is the sum over its query heads; one that does not hold the token pays it none. Every decoding
    step scores all entries again, the decoded ones too, so none is kept for its past. Nothing is protected.

    num_sink_tokens:    first positions that are never evicted
    observation_window: queries at the end of a prompt that count; the method is 1
    """

    requires: ClassVar[frozenset[str]] = frozenset({"window_attention", "decode_attention", "positions"})

    num_sink_tokens: int = 0
    observation_window: int = 1

    def score_prompt(self, activations: LayerActivations) -> Tensor:
        mass, positions = activations.window_attention, activations.positions
        sequence = torch.arange(len(mass), device=mass.device)[:, None, None]
        return _summed(mass.float(), sequence, positions, len(mass)) / mass.shape[1]

    def score_step(self, step: DecodeStep) -> Tensor:
        sequence, batch = step.segment // step.num_kv_heads, (len(step.indptr) - 1) // step.num_kv_heads
        return _summed(step.attention, sequence, step.positions, batch) / step.num_kv_heads


def _summed(mass: Tensor, sequence: Tensor, positions: Tensor, batch: int) -> Tensor:
    """For each entry the mass of its token in all heads of its sequence. positions as mass; sequence broadcasts."""
    span = int(positions.max()) + 2  # the first place of a sequence is that of absent entries, position -1
    place = (sequence * span + positions + 1).flatten()
    total = mass.new_zeros(batch * span).index_add(0, place, mass.flatten())
    return total[place].view_as(mass)
