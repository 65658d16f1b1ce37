"""From importance to shares, with the few numbers that the search sets.

Source: BaKlaVa (arXiv:2502.13176), reconstructed: that a parameter search favours important caches is known, the
parametrisation is ours (docs/explanation/baklava.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from kvpolicy import Budget, BudgetAllocator, Importance, PluginError, Trial

Shape = Literal["power", "two_level"]


@dataclass(frozen=True, slots=True)
class BaklavaAllocator(BudgetAllocator):
    """share = layer^layer_exponent * head^head_exponent, never under `floor_share` of the uniform share.

    shape: "power" as above, or "two_level": the `top_fraction` most important KV heads (by the same product) share
        `top_share` of the budget, the others the rest, each group evenly
    layer_exponent: 0, the default, switches the layer importance off (it misleads on SmolLM2)
    head_exponent: may be negative; then heads that change little are favoured
    floor_share: no KV head gets less than this part of the uniform share; the others give in proportion

    Head importance is used as it is, not relative to its layer: measured on SmolLM2, a head's importance against all
    heads of the model carries most of the gain.
    """

    shape: Shape = "power"
    layer_exponent: float = 0.0
    head_exponent: float = 1.0
    floor_share: float = 0.25
    top_fraction: float = 0.25
    top_share: float = 0.5

    def __post_init__(self) -> None:
        if self.shape not in ("power", "two_level"):
            raise PluginError(f"baklava: shape must be power or two_level, got '{self.shape}'")
        if not (0 <= self.floor_share <= 1 and 0 < self.top_fraction < 1 and 0 < self.top_share < 1):
            raise PluginError(
                "baklava: floor_share must lie in [0, 1], top_fraction and top_share in (0, 1); got "
                f"{self.floor_share}, {self.top_fraction}, {self.top_share}"
            )

    def shares(self, importance: Importance, budget: Budget) -> Tensor:
        weight = self._weight(importance)
        if self.shape == "two_level":
            weight = self._two_levels(weight)
        return _with_floor(weight, self.floor_share)

    def _weight(self, importance: Importance) -> Tensor:
        """`[L, H]`, float64, > 0 somewhere."""
        tiny = torch.finfo(torch.float64).eps
        head = importance.per_head.double().clamp(min=tiny)
        # the logarithm keeps large exponents in range
        log_weight = self.head_exponent * head.log()
        if importance.per_layer is not None:
            layer = importance.per_layer.double().clamp(min=tiny)
            log_weight = log_weight + self.layer_exponent * layer.log()[:, None]
        return (log_weight - log_weight.max()).exp()

    def _two_levels(self, weight: Tensor) -> Tensor:
        count = weight.numel()
        top = min(max(1, round(self.top_fraction * count)), count - 1) if count > 1 else 1
        levels = torch.full((count,), (1 - self.top_share) / max(count - top, 1), dtype=torch.float64)
        levels[weight.flatten().argsort(descending=True, stable=True)[:top]] = self.top_share / top
        return levels.reshape(weight.shape)

    @classmethod
    def suggest(cls, trial: Trial) -> Self:
        """The power shape: layer_exponent in [0, 2], head_exponent in [-4, 8], floor_share in [0, 0.5]."""
        return cls(
            layer_exponent=trial.suggest_float("layer_exponent", 0.0, 2.0),
            head_exponent=trial.suggest_float("head_exponent", -4.0, 8.0),
            floor_share=trial.suggest_float("floor_share", 0.0, 0.5),
        )


def _with_floor(weight: Tensor, floor: float) -> Tensor:
    """Shares with mean 1, proportional to `weight` where that gives at least `floor`, and `floor` elsewhere."""
    low = torch.zeros_like(weight, dtype=torch.bool)
    while True:
        scale = (weight.numel() - floor * int(low.sum())) / weight[~low].sum()
        shares = torch.where(low, floor, weight * scale)
        below = ~low & (shares < floor)
        if not bool(below.any()):
            return shares
        low |= below
