"""The definition and the torch path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvpolicy_kernels.compact.reference import reference_compact

if TYPE_CHECKING:
    from kvpolicy_kernels.rebuild.op import Chosen


def reference_rebuild(
    outs: Sequence[Tensor],
    chosen: Chosen,
    held: Sequence[Tensor] | None,
    fresh: Sequence[Tensor] | None,
    numbers: Sequence[tuple[Tensor, Tensor]],
) -> None:
    """Shapes as in `rebuild`."""
    counts, width = chosen.counts, chosen.width
    segment = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    offset = torch.arange(len(segment), device=counts.device) - (counts.cumsum(0) - counts)[segment]
    rows, column = chosen.starts[segment] + offset, chosen.columns[segment, offset]
    is_held = column < width
    if held is not None:
        own, source = (table[is_held] for table in (rows, chosen.former[segment] + column))
        for out, entries in zip(outs, held, strict=True):
            reference_compact(out, own, entries, source)
    if fresh is not None:
        for out, tokens in zip(outs, fresh, strict=True):
            own, source = (table[~is_held] for table in (rows, segment * tokens.shape[2] + column - width))
            reference_compact(out, own, tokens, source)
    for out, table in numbers:
        out.index_copy_(0, rows, table[segment, column].to(out.dtype))
