"""KVzip: keep what the model looks at when it repeats its context.

Source: KVzip, arXiv:2505.23416; snu-mllab/KVzip, attention/score.py; NVIDIA/kvpress, kvpress/presses/kvzip_press.py.
Different on purpose:

- Attention is the softmax over everything that a repeating query sees, and queries of any chunk count for any entry.
  The source takes, for a context of several chunks, the softmax over the first tokens, the chunk that is repeated and
  the repetition alone, and scores that chunk with it. For one chunk behind no more than sink tokens both are the same.
- The source keeps every token that comes after the context. Here the capacity holds: such tokens are kept before those
  of the context.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvpolicy import EvictionPolicy, LayerActivations, PluginError


@dataclass(frozen=True, slots=True)
class KVzipPolicy(EvictionPolicy):
    """An entry's score is the largest attention that any query of the group gives it while the context is repeated.

    repeat_chunk:    tokens that are repeated at a time
    num_sink_tokens: first positions that are never evicted
    """

    requires: ClassVar[frozenset[str]] = frozenset({"repeat_attention"})

    repeat_chunk: int = 2048
    num_sink_tokens: int = 4

    def __post_init__(self) -> None:
        if self.repeat_chunk < 1:
            raise PluginError(f"kvzip: repeat_chunk must be at least 1, got {self.repeat_chunk}")

    def score_prompt(self, activations: LayerActivations) -> Tensor:
        return activations.repeat_attention.float()
