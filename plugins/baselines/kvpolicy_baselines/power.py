"""Power: shares proportional to a power of the importance, over a floor.

No paper of its own: the plainest way from a measured importance to shares.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from kvpolicy import Budget, BudgetAllocator, Importance, PluginError, Trial


@dataclass(frozen=True, slots=True)
class PowerAllocator(BudgetAllocator):
    """share = importance^exponent, never under `floor_share` of the uniform share.

    exponent:    at least 0; 0 is uniform, above 1 favours the most important KV heads more
    floor_share: no KV head gets less than this part of the uniform share, in [0, 1]; the others give in proportion

    A KV head without importance gets the floor. Where none has any, the split is uniform.
    """

    exponent: float = 1.0
    floor_share: float = 0.25

    def __post_init__(self) -> None:
        if not (0 <= self.exponent < float("inf") and 0 <= self.floor_share <= 1):
            raise PluginError(
                "power: exponent must be finite and >= 0, floor_share must lie in [0, 1]; got "
                f"{self.exponent} and {self.floor_share}"
            )

    def shares(self, importance: Importance, budget: Budget) -> Tensor:
        scores = importance.per_head.double()
        best = float(scores.max())
        if best <= 0:
            return torch.ones(budget.shape, dtype=torch.float64)
        return _raised((scores / best) ** self.exponent, self.floor_share)

    @classmethod
    def suggest(cls, trial: Trial) -> Self:
        """`exponent` in [0, 4] and `floor_share` in [0, 0.5]."""
        return cls(
            exponent=trial.suggest_float("exponent", 0.0, 4.0),
            floor_share=trial.suggest_float("floor_share", 0.0, 0.5),
        )


def _raised(weight: Tensor, floor: float) -> Tensor:
    """Shares with mean 1: the larger of `floor` and a multiple of `weight`. weight: `[L, H]`, its maximum 1."""
    falling = weight.flatten().sort(descending=True).values
    above = torch.arange(1, len(falling) + 1, dtype=torch.float64)
    # the multiple if the `above` largest are over the floor and all others on it
    scale = (len(falling) - floor * (len(falling) - above)) / falling.cumsum(0)
    count = int((falling * scale >= floor).sum())  # those for which that is so come first
    return (weight * scale[max(count, 1) - 1]).clamp(min=floor)
