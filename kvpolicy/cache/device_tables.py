"""Tables of the CPU on a device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from kvpolicy_kernels.attention import WorkPlan
from torch import Tensor

AT_ONCE = 32 << 10
"""Bytes that a driver takes along with the command to copy them. Of more it waits for its turn, unless they are pinned,
which takes as long as three such copies."""


class Placed(NamedTuple):
    """Tables of an arena that a token's step has on the device, and the attention over them as its programs share it.

    They may be of the next token already.

    length: the lengths on the host that these are a copy of
    seen:   int64 [S], tokens of each segment's sequence
    """

    length: Tensor
    starts: Tensor
    lengths: Tensor
    seen: Tensor
    work: WorkPlan | None


class Brought(NamedTuple):
    """Tables of an arena on its device as its entries lie now, for a chunk that comes and for what is kept of it.

    start, length: those on the host that `tables`, int64 [2, S], is a copy of
    """

    start: Tensor
    length: Tensor
    tables: Tensor
    work: WorkPlan | None


def on_device(table: Tensor, device: torch.device) -> Tensor:
    """A table of the CPU on a device, which is not waited for: the CPU stays ahead of it through a whole prompt."""
    if device.type != "cuda" or table.nbytes <= AT_ONCE:
        return table.to(device, non_blocking=True)
    return table.pin_memory().to(device, non_blocking=True)


def each_entry(counts: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """The segment of each entry, and its place there, int64 [counts.sum()] both, made on the device.

    counts: int64 [S] on the CPU. The device is not waited for, and nothing as long as the entries is copied to it.
    """
    total, counts = int(counts.sum()), on_device(counts, device)
    segment = torch.arange(len(counts), device=device).repeat_interleave(counts, output_size=total)
    return segment, torch.arange(total, device=device) - (counts.cumsum(0) - counts)[segment]


def owners_of(starts: Tensor, count: int) -> Tensor:
    """The segment of each of `count` rows, int64 on the device of the ascending `starts`, int64 [S]."""
    # of segments without a row the last one begins where the next that has some does
    return torch.searchsorted(starts, torch.arange(count, device=starts.device), right=True) - 1
