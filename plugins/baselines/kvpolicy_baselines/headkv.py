"""HeadKV: a floor for every head, and a pool that heads share by their scores.

Source: HeadKV, arXiv:2410.19258; FYYFU/HeadKV, headkv/snapkv_utils.py, `ReasonSnapKVCluster`. Different on purpose:

- The total is exact. The source rounds each head by itself, and the parts of floor and pool down.
- Budgets are those of KV heads. The source repeats the KV heads and gives one to each query head.
- This is the allocator alone: any policy runs under it. The source's policy is SnapKV, its scores are in files of two
  models; the estimator `retrieval` measures such scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from kvpolicy import Budget, BudgetAllocator, Importance, PluginError, Trial


@dataclass(frozen=True, slots=True)
class HeadKVAllocator(BudgetAllocator):
    """Every KV head gives the `beta`-th part of its entries to a pool, which is shared by score ** temperature.

    beta:        >= 1; 1 puts everything into the pool, a large one is uniform
    temperature: > 0; above 1 favours the best heads more
    window:      entries that each KV head has beforehand, for SnapKV's window; a mean at or below it is split evenly
    """

    beta: float = 1.01
    temperature: float = 1.0
    window: int = 32

    def __post_init__(self) -> None:
        if not (self.beta >= 1 and self.temperature > 0 and self.window >= 0):
            raise PluginError(
                "headkv: beta must be >= 1, temperature > 0 and window >= 0, got "
                f"{self.beta}, {self.temperature} and {self.window}"
            )

    def shares(self, importance: Importance, budget: Budget) -> Tensor:
        base = budget.uniform_capacity - self.window
        scores = importance.per_head.double()
        best = float(scores.max())
        if base <= 0 or best <= 0:
            return torch.ones(budget.shape, dtype=torch.float64)
        weight = (scores / best) ** self.temperature
        pool = base / self.beta
        return self.window + base - pool + pool * weight / weight.mean()

    @classmethod
    def suggest(cls, trial: Trial) -> Self:
        """`beta` in [1.005, 10], as in the source's scripts, and `temperature` in [0.25, 4]; both logarithmic."""
        return cls(
            beta=trial.suggest_float("beta", 1.005, 10.0, log=True),
            temperature=trial.suggest_float("temperature", 0.25, 4.0, log=True),
        )
