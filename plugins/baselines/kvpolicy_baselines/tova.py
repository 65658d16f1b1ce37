"""TOVA: keep what the last query attends to.

Source: "Transformers are Multi-State RNNs", arXiv:2401.06104; schwartz-lab-NLP/TOVA, src/tova_cache.py.
Different on purpose:

- Each KV head keeps its own entries, by the sum over its query heads. The source averages over all heads of a layer and
  keeps one set of tokens there, which budgets per KV head rule out.
- In decoding the worst entry makes room before the new token attends, so a capacity of `c` here is a cache size of
  `c - 1` in the source, which attends over one entry more than it keeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvpolicy import DecodeStep, EvictionPolicy, LayerActivations


@dataclass(frozen=True, slots=True)
class TOVAPolicy(EvictionPolicy):
    """An entry's score is the attention that the last query pays it, summed over the query heads of its group.

    Every decoding step scores all entries anew, the decoded ones too, so none is kept for its past. Nothing is
    protected.

    num_sink_tokens:    first positions that are never evicted
    observation_window: queries at the end of a prompt that count; the method is 1
    """

    requires: ClassVar[frozenset[str]] = frozenset({"window_attention", "decode_attention"})

    num_sink_tokens: int = 0
    observation_window: int = 1

    def score_prompt(self, activations: LayerActivations) -> Tensor:
        assert activations.window_attention is not None  # `requires` lists it
        return activations.window_attention.float()

    def score_step(self, step: DecodeStep) -> Tensor:
        assert step.attention is not None
        return step.attention.float()
