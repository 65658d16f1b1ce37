"""CORM: keep what recent queries found important.

Source: CORM, arXiv:2404.15949; no public code was found, and its body was not read. Reconstructed from its abstract
and from summaries: an entry is important to a query that pays it at least 1/t, an even share of t entries, and an entry
stays while some recent query finds it important. Different on purpose:

- The source has no budget: it gives up an entry as soon as the last w queries pass it over. Here a capacity says how
  many stay, and those go first that were passed over for the longest time: the same order, with the w that fits.
- A KV head's query heads mark together, by their mean attention. A decoding step is given nothing else.
- The share is that of what a query pays to entries: a learned sink's part is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvpolicy import DecodeStep, EvictionPolicy, LayerActivations, PluginError


@dataclass(frozen=True, slots=True)
class CORMPolicy(EvictionPolicy):
    """An entry's score is one more than the position of the last query that it was important to; 0 if there is none.

    Important is what gets at least the mean of what the query pays to the entries that it sees. Of a prompt, or a chunk
    of one, the last queries are asked, in decoding every one. The recent tokens have been asked about few times, so the
    `recent_window` last ones are kept in any case.

    observation_window: queries at the end of a prompt that are asked
    recent_window:      last positions that are never evicted
    num_sink_tokens:    first positions that are never evicted
    """

    requires: ClassVar[frozenset[str]] = frozenset({"positions", "scores", "query_attention", "decode_attention"})
    new_entry_score: ClassVar[float] = 0.0

    observation_window: int = 32
    recent_window: int = 32
    num_sink_tokens: int = 0

    def __post_init__(self) -> None:
        if self.observation_window < 1:
            raise PluginError(f"corm: observation_window must be at least 1, got {self.observation_window}")

    def score_prompt(self, activations: LayerActivations) -> Tensor:
        mass, positions, scores = activations.query_attention, activations.positions, activations.scores
        asking = positions[:, :, -mass.shape[2] :, None]  # [B, H, w, 1]
        seen = (positions[:, :, None] >= 0) & (positions[:, :, None] <= asking)
        share = mass.sum(-1, keepdim=True) / seen.sum(-1, keepdim=True).clamp(min=1)
        marked = seen & (mass >= share)
        return torch.maximum(scores, ((asking + 1) * marked).amax(2).float())

    def score_step(self, step: DecodeStep) -> Tensor:
        share = step.total(step.attention) / step.lengths.clamp(min=1)
        asking = step.seen[step.segment // step.num_kv_heads]  # one more than its position
        return torch.where(step.attention >= step.at_segment(share), asking.float(), step.scores)
