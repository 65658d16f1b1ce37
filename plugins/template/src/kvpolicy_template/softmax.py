"""Shares as a softmax of the importance: one number runs from uniform to winner-takes-all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from torch import Tensor

from kvpolicy import Budget, BudgetAllocator, Importance, Trial


@dataclass(frozen=True, slots=True)
class SoftmaxAllocator(BudgetAllocator):
    """share = exp(importance / (mean importance * temperature)), over all KV heads.

    temperature: > 0; large values approach uniform shares
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}")

    def shares(self, importance: Importance, budget: Budget) -> Tensor:
        relative = importance.per_head / importance.per_head.mean().clamp(min=1e-12)
        return (relative / self.temperature).flatten().softmax(0).reshape(budget.shape)

    @classmethod
    def suggest(cls, trial: Trial) -> Self:
        return cls(temperature=trial.suggest_float("temperature", 0.1, 10.0, log=True))
