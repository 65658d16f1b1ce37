"""H2O: keep the heavy hitters, the entries that all queries so far have attended to most.

Source: H2O, arXiv:2306.14048; FMInference/H2O, h2o_hf/utils_real_drop/modify_llama.py. Different on purpose:

- The recent window is a number of tokens (`recent_window`), not half of the cache; the source has both.
- Under grouped-query attention a KV head adds up its query heads; the source repeats the KV heads and chooses for each
  query head.
- In decoding the worst entry makes room before the new token attends, so a capacity of `c` here is a cache size of
  `c - 1` in the source, which attends over one entry more than it keeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvpolicy import DecodeStep, EvictionPolicy, LayerActivations


@dataclass(frozen=True, slots=True)
class H2OPolicy(EvictionPolicy):
    """An entry's score is the attention it got, summed over queries and over the query heads of its group.

    Each chunk of a prompt and each decoding step adds its attention; a token starts from 0. The recent tokens have had
    few queries to collect from, so the `recent_window` last ones are kept in any case.

    num_sink_tokens: first positions that are never evicted; the source protects none, they are heavy hitters anyhow
    recent_window:   last positions that are never evicted
    """

    requires: ClassVar[frozenset[str]] = frozenset({"scores", "full_attention", "decode_attention"})
    new_entry_score: ClassVar[float] = 0.0

    num_sink_tokens: int = 0
    recent_window: int = 32

    def score_prompt(self, activations: LayerActivations) -> Tensor:
        return activations.scores + activations.full_attention

    def score_step(self, step: DecodeStep) -> Tensor:
        return step.scores + step.attention
