"""Paired comparison of two methods on the same sequences."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RESAMPLES = 10_000
_LEAST = 1e-12  # nats: a loss that is rounded to 0 has a large relative increase, not an infinite one


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


def relative_increase(losses: Tensor, base: Tensor, seed: int = 0) -> tuple[float, float, float]:
    """(mean of losses - mean of base) / mean of base, and its 95 % percentile bootstrap interval over the pairs.

    losses, base: `[n]`, the mean losses of the same n sequences, base above 0
    """
    added, base = (losses - base).double().cpu(), base.double().cpu()
    picks = _picks(len(base), seed)
    ratios = added[picks].sum(1) / base[picks].sum(1).clamp(min=_LEAST)
    return float(added.sum() / base.sum().clamp(min=_LEAST)), *_middle(ratios)


def mean_interval(values: Tensor, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean. values: `[n]`."""
    return _middle(values.double().cpu()[_picks(len(values), seed)].mean(1))


def _picks(count: int, seed: int) -> Tensor:
    """int64 `[RESAMPLES, count]`: which pairs each resample holds."""
    return torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(seed))


def _middle(values: Tensor) -> tuple[float, float]:
    """Where the middle 95 % of `[RESAMPLES]` values lie."""
    values = values.sort().values
    return float(values[round(0.025 * RESAMPLES)]), float(values[round(0.975 * RESAMPLES) - 1])
