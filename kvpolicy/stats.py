"""Paired comparison of two methods on the same sequences."""

from __future__ import annotations

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
