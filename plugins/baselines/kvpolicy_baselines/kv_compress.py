"""KV-Compress: keep what got the largest squared attention, wherever in the model it lies.

Source: KV-Compress, arXiv:2410.00161; IsaacRe/vllm-kvcompress, vllm/kvcompress/metrics.py and
vllm/attention/backends/flash_attn.py. Different on purpose:

- Entries go one by one. The source frees whole blocks of 16 entries of a head, by the best entry of each block.
- A KV head pools the sum over its query heads; the source pools each query head, then adds up.
- The capacity holds at every decoding step, as under the source's continual compression, which works in intervals.
- Neighbours are neighbours by position, and a later chunk of a prompt is scored again by its own last queries.
- A bias of KV heads, averages instead of sums and equal parts for all layers are not there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvpolicy import (
    Budget,
    BudgetAllocator,
    DecodeStep,
    EvictionPolicy,
    Importance,
    LayerActivations,
    LayerStatistics,
    PluginError,
)
from kvpolicy_baselines.pooling import pooled


@dataclass(frozen=True, slots=True)
class KVCompressPolicy(EvictionPolicy):
    """An entry's score is the squared attention of the last queries, summed, then the largest among its neighbours.

    Squares favour what few queries need badly over what all look at a little. Each decoding step adds its own; a
    decoded token starts from 0.

    attention_power:    what attention is raised to; the method is 2, and 1 is the ablation of the paper
    kernel_size:        positions that are pooled, odd; 1 pools nothing
    observation_window: queries at the end of a prompt that are asked
    recent_window:      last positions that are never evicted; in the source the same number
    num_sink_tokens:    first positions that are never evicted; the source protects none
    """

    requires: ClassVar[frozenset[str]] = frozenset({"window_attention", "decode_attention", "positions"})
    new_entry_score: ClassVar[float] = 0.0

    attention_power: float = 2.0
    kernel_size: int = 7
    observation_window: int = 8
    recent_window: int = 8
    num_sink_tokens: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.attention_power < torch.inf:
            raise PluginError(f"kv_compress: attention_power must be above 0, got {self.attention_power}")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise PluginError(f"kv_compress: kernel_size must be odd and at least 1, got {self.kernel_size}")
        if self.observation_window < 1:
            raise PluginError(f"kv_compress: observation_window must be at least 1, got {self.observation_window}")

    def score_prompt(self, activations: LayerActivations) -> Tensor:
        return pooled(activations.window_attention.float(), activations.positions, self.kernel_size, "max")

    def score_step(self, step: DecodeStep) -> Tensor:
        return step.scores + step.attention


@dataclass(frozen=True, slots=True)
class KVCompressAllocator(BudgetAllocator):
    """A head's share is the number of its entries among the best of the whole model.

    The best are as many as the budget has room for besides what stays in any case: sink tokens, the recent window, and
    the best of each head up to its floor. So the model keeps its best entries, whatever their layer and head. The
    scores have to be on one scale in all layers.
    """

    needs_importance: ClassVar[bool] = False
    split_scope: ClassVar[Literal["none", "layer", "model"]] = "model"

    def shares(self, importance: Importance, budget: Budget) -> Tensor:
        """Uniform: nothing is known before a prompt."""
        return torch.ones(budget.shape)

    def split(self, scores: Sequence[Tensor], budget: Budget, *statistics: LayerStatistics) -> Tensor:
        """Shares in entries, which sum to the budget where there are enough of them."""
        shares = [self._row([layer[row] for layer in scores], budget) for row in range(len(scores[0]))]
        return torch.stack(shares)

    def _row(self, layers: list[Tensor], budget: Budget) -> Tensor:
        """layers: `[H, n]` each, of one sequence. Returns `[l + 1, H]`, float64, > 0."""
        floors = budget.floors().to(layers[0].device)
        parts = [_competing(scores, floor) for scores, floor in zip(layers, floors, strict=True)]
        certain = torch.stack([count for _, count in parts])
        every = torch.cat([scores.flatten() for scores, _ in parts])
        count = min(budget.total - int(certain.sum()), int(every.isfinite().sum()))
        if count <= 0:
            return certain.double().clamp(min=1e-6)  # where nothing can be compared: evenly
        last = every.topk(count).values[-1]
        above = torch.stack([(scores > last).sum(1) for scores, _ in parts])
        equal = torch.stack([(scores == last).sum(1) for scores, _ in parts])
        shared = (count - above.sum()) * equal.double() / equal.sum()  # ties must not depend on padding
        return (certain + above + shared).clamp(min=1e-6)


def _competing(scores: Tensor, floors: Tensor) -> tuple[Tensor, Tensor]:
    """What competes, `[H, n]` in no order, -inf for the rest; and how many entries of each head are certain, `[H]`."""
    best = scores.sort(dim=1, descending=True).values
    staying, present = (best == torch.inf).sum(1), (best > -torch.inf).sum(1)
    certain = torch.minimum(torch.maximum(staying, floors), present)
    rank = torch.arange(best.shape[1], device=best.device)
    return best.masked_fill(rank < certain[:, None], -torch.inf), certain
