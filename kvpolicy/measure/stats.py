"""Paired comparison of two methods on the same sequences."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

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
    draws = _draws(len(base), seed)
    ratios = (draws @ added) / (draws @ base).clamp(min=_LEAST)
    return float(added.sum() / base.sum().clamp(min=_LEAST)), *_percentiles(ratios)


def mean_interval(values: Tensor, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean. values: `[n]`."""
    return _percentiles(_draws(len(values), seed) @ values.double().cpu())


@dataclass(frozen=True, slots=True)
class ExcessShare:
    """(a - full) / (b - full) in perplexity, and its 95 % bootstrap interval over sequences."""

    mean: float
    low: float
    high: float
    n: int


def excess_share(a: Tensor, b: Tensor, full: Tensor, seed: int = 0) -> ExcessShare | None:
    """Which part of b's perplexity above `full`'s is left under a. Perplexity is exp of the mean loss.

    a, b, full: `[n]`, the mean losses of the same n sequences, nats per token

    Percentile bootstrap: sequences are drawn with replacement, both excesses computed, and their quotient is taken. A
    draw in which b costs nothing counts as an infinite share. None where the 95 % interval of b's own excess is not
    above 0: of nothing there is no part.
    """
    if paired_difference(b, full, seed).low <= 0:
        return None
    ours, theirs = ((x - full).double().cpu() for x in (a, b))
    draws = _draws(len(ours), seed)
    left, whole = torch.expm1(draws @ ours), torch.expm1(draws @ theirs)
    shares = torch.where(whole > 0, left / whole, math.inf)
    return ExcessShare(math.expm1(ours.mean()) / math.expm1(theirs.mean()), *_percentiles(shares), len(ours))


@lru_cache(maxsize=1)  # a report asks for the same ones many times
def _draws(count: int, seed: int) -> Tensor:
    """float64 `[RESAMPLES, count]`: the part that each sequence has in each draw of `count` with replacement."""
    picks = torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(seed))
    one = torch.tensor(1 / count, dtype=torch.float64)
    return torch.zeros(RESAMPLES, count, dtype=torch.float64).scatter_add_(1, picks, one.expand(picks.shape))


def _percentiles(values: Tensor) -> tuple[float, float]:
    """The bounds that leave out 2.5 % of the resamples on each side. values: `[RESAMPLES]`."""
    ordered = values.sort().values
    return float(ordered[round(0.025 * RESAMPLES)]), float(ordered[round(0.975 * RESAMPLES) - 1])
