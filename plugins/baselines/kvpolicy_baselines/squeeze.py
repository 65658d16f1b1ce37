"""SqueezeAttention: layers in three clusters, of which the least important gives entries to the others.

Source: SqueezeAttention, arXiv:2404.04793; hetailang/SqueezeAttention, utils_hh/modify_llama_drop.py. Different on
purpose:

- The clusters are the best ones. The source's k-means starts at random places, so that its budgets may differ from run
  to run. Values on a line can be tried out: a cluster is a run of neighbours.
- `percent` is a part of the uniform capacity, so that it means the same at every retention. The source's is a part of
  the prompt; its examples, 0.08 of 0.21 and 0.25 of 0.4, are 0.38 and 0.63 here.
- The total is exact. The source rounds down.
- Shares are made once, from the estimator's values. The source makes them for every prompt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Self

import torch
from torch import Tensor

from kvpolicy import Budget, BudgetAllocator, Importance, PluginError, Trial
from kvpolicy_baselines.layers import layer_importance

_CLUSTERS = 3


@dataclass(frozen=True, slots=True)
class SqueezeAllocator(BudgetAllocator):
    """Layers fall into three clusters by importance. The least important one gets `percent`, the others the rest.

    The two other clusters get the same, and so do the KV heads of one layer. Where layers have only two values these
    are the clusters; where they have one, the split is uniform.

    percent: part of the uniform capacity that the least important layers get, in [0, 1]; 1 is uniform
    """

    percent: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.percent <= 1:
            raise PluginError(f"squeeze: percent must lie in [0, 1], got {self.percent}")

    def shares(self, importance: Importance, budget: Budget) -> Tensor:
        values = layer_importance(importance)
        least = values < _second_cluster(values)
        count, layers = int(least.sum()), len(values)
        rest = (layers - count * self.percent) / (layers - count)
        shares = torch.where(least, self.percent, rest)
        return shares.double()[:, None].repeat(1, budget.shape[1])

    @classmethod
    def suggest(cls, trial: Trial) -> Self:
        """`percent` in [0.05, 1]."""
        return cls(percent=trial.suggest_float("percent", 0.05, 1.0))


def _second_cluster(values: Tensor) -> float:
    """The least value that is not in the lowest cluster; the least of all where all are equal.

    values: float64 `[L]`. The clusters are those with the least sum of squared distances to their means.
    """
    of_layers: list[float] = values.tolist()
    distinct = sorted(set(of_layers))
    clusters = min(_CLUSTERS, len(distinct))
    if clusters == 1:
        return distinct[0]
    # sums over prefixes give the spread of any run of neighbours
    counts = torch.tensor([of_layers.count(value) for value in distinct])
    scaled = (torch.tensor(distinct, dtype=torch.float64) - distinct[0]) / (distinct[-1] - distinct[0])
    number, total, square = ([0.0, *(counts * scaled**power).cumsum(0).tolist()] for power in range(3))

    def spread(cuts: tuple[int, ...]) -> float:
        parts = [
            square[end] - square[begin] - (total[end] - total[begin]) ** 2 / (number[end] - number[begin])
            for begin, end in pairwise((0, *cuts, len(distinct)))
        ]
        return math.fsum(parts)

    best = min(combinations(range(1, len(distinct)), clusters - 1), key=spread)
    return distinct[best[0]]
