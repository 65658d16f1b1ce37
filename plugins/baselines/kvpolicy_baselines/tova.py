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
        mass, positions = activations.window_attention.float(), activations.positions
        return _of_tokens(mass.flatten(1), positions.flatten(1), mass.shape[1]).view_as(mass) / mass.shape[1]

    def score_step(self, step: DecodeStep) -> Tensor:
        # few launches: at each token and layer they take longer than what they do
        span, heads = step.max_positions + 1, step.num_kv_heads  # the first place of a segment is that of free rows
        place = step.positions + 1
        by_place = step.attention.new_zeros(len(step.lengths) * span)
        by_place.scatter_(0, torch.add(place, step.segment, alpha=span), step.attention)
        mean = by_place.view(-1, heads, span).mean(1)
        return mean[0, place] if len(mean) == 1 else mean[step.segment // heads, place]


def _of_tokens(mass: Tensor, positions: Tensor, num_heads: int) -> Tensor:
    """For each entry the mass of its token in all heads. Both `[B, N]`, the entries of a sequence in any order.

    In the order of positions a token's entries, at most one a head, lie in a row. So all have the same sum to the bit.
    """
    place, order = positions.sort(dim=1, stable=True)
    begins = torch.ones_like(place, dtype=torch.bool)
    begins[:, 1:] = place[:, 1:] != place[:, :-1]
    sorted_mass = mass.gather(1, order)
    total = sorted_mass.clone()
    for step in range(1, min(num_heads, place.shape[1])):
        total[:, :-step] += sorted_mass[:, step:].masked_fill(place[:, step:] != place[:, :-step], 0.0)
    columns = torch.arange(place.shape[1], device=place.device)
    first = torch.where(begins, columns, 0).cummax(1).values
    return torch.empty_like(total).scatter_(1, order, total.gather(1, first))
