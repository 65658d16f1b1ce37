"""Paired comparison of two methods on the same sequences, and of two rankings of the same things."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

RESAMPLES = 10_000


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """mean of (a - b) and its 95 % bootstrap interval over sequences, in the unit of the losses."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def verdict(self) -> str:
        """What may be said about a, followed by the name of b; smaller is better."""
        if self.high < 0:
            return "better than"
        return "worse than" if self.low > 0 else "not distinguishable from"


def paired_difference(a: Tensor, b: Tensor, seed: int = 0) -> PairedDifference:
    """Percentile bootstrap over the pairs. a, b: `[n]`, the mean losses of the same n sequences."""
    difference = (a - b).double().cpu()
    return PairedDifference(float(difference.mean()), *mean_interval(difference, seed), len(difference))


def mean_interval(values: Tensor, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean. values: `[n]`."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    means = values.double().cpu()[picks].mean(1).sort().values
    return float(means[round(0.025 * RESAMPLES)]), float(means[round(0.975 * RESAMPLES) - 1])


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of a and b, both `[n]`; ties share their mean rank. NaN where one is all ties."""
    return float(torch.corrcoef(torch.stack([_ranks(a), _ranks(b)]))[0, 1])


def chance_correlation(n: int) -> float:
    """What 95 % of the rank correlations of two unrelated rankings of n things stay within, about."""
    return min(1.0, 1.96 / math.sqrt(max(n - 1, 1)))


def _ranks(values: Tensor) -> Tensor:
    """float64 `[n]`, from 0."""
    row = values.double().cpu()
    below, tied = row[:, None] > row, row[:, None] == row
    return below.sum(1) + (tied.sum(1).double() - 1) / 2
