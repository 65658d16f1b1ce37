"""Ada-KV: split a layer's budget by where the best scores of the prompt at hand are.

Source: Ada-KV, arXiv:2407.11550; FFY0/AdaKV, adaptive_snapkv/monkeypatch/snapkv_utils.py,
`AdaptiveSnapKVCluster`. Different on purpose:

- Entries that tie for the last places are shared in proportion to how many of them each head has.
- The total is exact. The source rounds each head by itself and may miss it by half an entry a head.
- Budgets are those of KV heads, and any policy's scores are compared, as long as they are on one scale in all heads.
- The options `normalize`, `skip` and `pyram_mode` are not there; all layers get the same total.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvpolicy import Budget, BudgetAllocator, Importance, LayerStatistics, PluginError


@dataclass(frozen=True, slots=True)
class AdaKVAllocator(BudgetAllocator):
    """A head's share is the number of its entries among the best of its layer, mixed with the uniform share.

    The best are as many as the layer may keep besides what stays in any case (sink tokens, the recent window). Heads
    with spread attention get more, heads with few heavy entries less.

    safeguard: part of the budget that is split evenly, in [0, 1]; 1 is uniform
    """

    needs_importance: ClassVar[bool] = False
    split_scope: ClassVar[Literal["none", "layer", "model"]] = "layer"

    safeguard: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.safeguard <= 1:
            raise PluginError(f"adakv: safeguard must lie in [0, 1], got {self.safeguard}")

    def shares(self, importance: Importance, budget: Budget) -> Tensor:
        """Uniform: nothing is known before a prompt."""
        return torch.ones(budget.shape)

    def split(self, scores: Sequence[Tensor], budget: Budget, *statistics: LayerStatistics) -> Tensor:
        """Shares in entries, which sum to the budget where there are enough of them. The device is never waited for."""
        own = scores[-1]  # [b, H, n]
        staying, plain = (own == torch.inf).sum(2), own.isfinite()  # [b, H], [b, H, n]
        free = (budget.total - staying.sum(1)).clamp(min=0)
        count = free.minimum(plain.sum((1, 2)))
        competing = own.masked_fill(~plain, -torch.inf)
        best = competing.flatten(1).topk(max(1, min(budget.total, competing[0].numel()))).values
        last = best.gather(1, count[:, None].clamp(min=1) - 1)[:, :, None]
        above, equal = (competing > last).sum(2), (competing == last).sum(2)
        # ties must not depend on padding
        chosen = above + (count - above.sum(1))[:, None] * equal.double() / equal.sum(1, keepdim=True)
        mixed = (1 - self.safeguard) * chosen + self.safeguard * free.double()[:, None] / own.shape[1]
        return (staying + mixed).clamp(min=1e-6)[:, None]  # where nothing can be compared: evenly
