"""Uniform: every KV head matters alike and gets the same capacity. What other methods are measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvpolicy import Budget, BudgetAllocator, Importance, ImportanceEstimator, ModelProbe


@dataclass(frozen=True, slots=True)
class UniformEstimator(ImportanceEstimator):
    """Importance 1 for every KV head; runs no forward."""

    def estimate(self, probe: ModelProbe) -> Importance:
        layers, heads = probe.spec.table_shape
        return Importance(per_head=torch.ones(layers, heads), per_layer=torch.ones(layers))


@dataclass(frozen=True, slots=True)
class UniformAllocator(BudgetAllocator):
    """The same share for every KV head."""

    needs_importance: ClassVar[bool] = False

    def shares(self, importance: Importance, budget: Budget) -> Tensor:
        return torch.ones(budget.shape)
