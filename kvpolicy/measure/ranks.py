"""How alike two rankings of the same things are."""

from __future__ import annotations

import math

import torch
from torch import Tensor


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
