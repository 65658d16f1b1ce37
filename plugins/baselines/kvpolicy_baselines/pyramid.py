"""PyramidKV: more entries for the first layers, fewer for the last, in equal steps.

Source: PyramidKV, arXiv:2406.02069; Zefan-Cai/KVCache-Factory, pyramidkv/pyramidkv_utils.py. Different on purpose:

- The total is exact. The source rounds the step down, which loses some entries.
- Where the first layer would get more than there are tokens it gets them all, and the last one the rest. The source
  does so too, but takes a uniform budget as soon as the mean is above half of the tokens.
- This is the allocator alone: any policy runs under it. The source's policy is SnapKV.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from kvpolicy import Budget, BudgetAllocator, Importance, PluginError, Trial


@dataclass(frozen=True, slots=True)
class PyramidAllocator(BudgetAllocator):
    """Shares fall linearly from the first layer to the last; the KV heads of a layer get the same.

    Every layer has `window` entries beyond dispute. Of the rest the last layer gets the mean divided by `beta`, and
    the first as much above the mean as the last is below it.

    beta:   steepness, >= 1; 1 is uniform
    window: entries that each KV head gets beforehand, for SnapKV's window; a mean at or below it is split evenly
    """

    needs_importance: ClassVar[bool] = False

    beta: float = 20.0
    window: int = 32

    def __post_init__(self) -> None:
        if not self.beta >= 1 or self.window < 0:
            raise PluginError(f"pyramid: beta must be >= 1 and window >= 0, got {self.beta} and {self.window}")

    def shares(self, importance: Importance, budget: Budget) -> Tensor:
        mean = budget.uniform_capacity - self.window
        if mean <= 0:
            return torch.ones(budget.shape, dtype=torch.float64)
        layers, heads = budget.shape
        most = int(budget.ceilings().max()) - self.window
        first = max(mean, min(2 * mean - mean / self.beta, most))
        steps = torch.linspace(first, 2 * mean - first, layers, dtype=torch.float64)
        return (self.window + steps)[:, None].repeat(1, heads)

    @classmethod
    def suggest(cls, trial: Trial) -> Self:
        """A steepness `beta` in [1, 100], on a logarithmic scale."""
        return cls(beta=trial.suggest_float("beta", 1.0, 100.0, log=True))
