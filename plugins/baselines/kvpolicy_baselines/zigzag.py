"""ZigZagKV: a small budget for every layer, and the rest in proportion to what it needs.

Source: ZigZagKV, arXiv:2412.09036. Reconstructed: the paper's body was not readable. The formula is that of a pull
request to NVIDIA/kvpress (#238), which calls it the paper's equation 6, and so is the default of the least budget.
Different on purpose:

- The total is exact.
- Shares are made once, from the estimator's values. The source makes them for every prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from torch import Tensor, full

from kvpolicy import Budget, BudgetAllocator, Importance, PluginError, Trial
from kvpolicy_baselines.layers import layer_importance


@dataclass(frozen=True, slots=True)
class ZigZagAllocator(BudgetAllocator):
    """A layer gets `floor_share` of the uniform capacity, and of what is left a part in proportion to its importance.

    With the estimator `entropy` importance is the number of entries that a layer needs. The KV heads of one layer get
    the same.

    floor_share: part of the uniform capacity that every layer gets beforehand, in [0, 1]; 1 is uniform
    """

    floor_share: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.floor_share <= 1:
            raise PluginError(f"zigzag: floor_share must lie in [0, 1], got {self.floor_share}")

    def shares(self, importance: Importance, budget: Budget) -> Tensor:
        needed = layer_importance(importance)
        if not bool(needed.any()):
            return full(budget.shape, 1.0)
        shares = self.floor_share + (1 - self.floor_share) * needed / needed.mean()
        return shares[:, None].repeat(1, budget.shape[1])

    @classmethod
    def suggest(cls, trial: Trial) -> Self:
        """`floor_share` in [0, 1]."""
        return cls(floor_share=trial.suggest_float("floor_share", 0.0, 1.0))
