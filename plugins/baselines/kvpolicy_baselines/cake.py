"""CAKE: a layer gets the more entries, the wider its attention is spread and the more it shifts.

Source: CAKE, arXiv:2503.12491; antgroup/cakekv, cake/model/modify_llama.py and cake/cake_cache.py. The part that splits
the budget; who evicts is a policy of its own. Different on purpose:

- Entropy and variance are those of a KV head's attention, the mean over its query heads. The source adds up those of
  every query head.
- What is split is what the budget has room for besides sink tokens and the recent window, whatever the policy protects.
- A layer cannot get more than there are tokens; what is left goes to the others in the same proportions. The source
  gives all of them the same of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvpolicy import Budget, BudgetAllocator, Importance, LayerStatistics, PluginError


@dataclass(frozen=True, slots=True)
class CAKEAllocator(BudgetAllocator):
    """A layer's share is `entropy ** (1 / tau1) * variance ** (1 / tau2)` of its attention; its KV heads get the same.

    Both are those of the policy's observation window, summed over the KV heads. The split is done again behind each
    layer, so that earlier layers shrink for later ones.

    tau1: above 1 flattens what entropy says, below 1 sharpens it
    tau2: the same for variance
    """

    needs_importance: ClassVar[bool] = False
    split_scope: ClassVar[Literal["none", "layer", "model"]] = "model"
    requires: ClassVar[frozenset[str]] = frozenset({"attention_entropy", "attention_variance"})

    tau1: float = 1.0
    tau2: float = 1.0

    def __post_init__(self) -> None:
        if not (0 < self.tau1 < torch.inf and 0 < self.tau2 < torch.inf):
            raise PluginError(f"cake: tau1 and tau2 must be above 0, got {self.tau1} and {self.tau2}")

    def shares(self, importance: Importance, budget: Budget) -> Tensor:
        """Uniform: nothing is known before a prompt."""
        return torch.ones(budget.shape)

    def split(self, scores: Sequence[Tensor], budget: Budget, *statistics: LayerStatistics) -> Tensor:
        """Shares in entries, which sum to the budget where there are enough of them."""
        staying = torch.stack([(layer == torch.inf).sum(2) for layer in scores], 1).double()  # [B, l + 1, H]
        wants = torch.stack([self._want(layer) for layer in statistics], 1)
        parts = wants / wants.sum(1, keepdim=True)
        free = (budget.total - staying.sum((1, 2), keepdim=True)).clamp(min=0)
        return staying + free * parts[..., None] / staying.shape[2]

    def _want(self, layer: LayerStatistics) -> Tensor:
        """float64 `[B]`, > 0: where nothing can be compared, layers want the same."""
        entropy, variance = layer.attention_entropy.double().sum(1), layer.attention_variance.double().sum(1)
        return (entropy.clamp(min=0) ** (1 / self.tau1) * variance.clamp(min=0) ** (1 / self.tau2)).clamp(min=1e-30)
