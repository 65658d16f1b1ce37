"""One count for the KV heads of a layer, which each still keep entries of their own.

Source: the rule of serving engines whose cache has one length for all heads: TensorRT-LLM, pull request 16957, eviction
modes `per_head` and `per_layer_perhead`, where every head of every layer keeps `budget` tokens. That rule is
`exponent=0`, and the allocator `uniform`. Different on purpose: counts may differ by layer, as the importance says, so
that what counts per head are worth can be told from what counts per layer are worth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from kvpolicy import Budget, BudgetAllocator, Importance, PluginError, Trial


@dataclass(frozen=True, slots=True)
class SameCountAllocator(BudgetAllocator):
    """A layer gets what its KV heads would get in proportion to importance ** exponent, and splits it evenly.

    exponent: 0 is uniform; negative values favour heads of little importance
    """

    exponent: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.exponent):
            raise PluginError(f"same_count: exponent must be a finite number, got {self.exponent}")

    def shares(self, importance: Importance, budget: Budget) -> Tensor:
        heads = importance.per_head.double().clamp(min=torch.finfo(torch.float64).eps)
        logs = self.exponent * heads.log()  # the logarithm keeps large exponents in range
        return (logs - logs.max()).exp().mean(1, keepdim=True).repeat(1, budget.shape[1])

    @classmethod
    def suggest(cls, trial: Trial) -> Self:
        """An exponent in [-4, 8]."""
        return cls(exponent=trial.suggest_float("exponent", -4.0, 8.0))
