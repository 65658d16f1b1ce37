"""What one entry of a store takes."""

from __future__ import annotations

import torch

from kvpolicy.model.spec import ModelSpec
from kvpolicy.plugins.roles import EvictionPolicy


def holds_scores(policy: EvictionPolicy, split: object | None) -> bool:
    """Whether each entry has a score beside it: not under a window rule, unless its budget is split at run time.

    split: what splits, None for nothing
    """
    return not policy.window_rule or split is not None


def entry_nbytes(spec: ModelSpec, dtype: torch.dtype, *, scored: bool) -> int:
    """Bytes of one entry: key, value and position, and its score where there is one. dtype: of keys and values."""
    return spec.entry_bytes(dtype.itemsize) + beside_nbytes(scored=scored)


def beside_nbytes(*, scored: bool) -> int:
    """Bytes of one entry beside its key and value: its position, and its score where there is one."""
    return torch.int32.itemsize + (torch.float32.itemsize if scored else 0)
