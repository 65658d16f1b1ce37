"""The definition and the torch path."""

from __future__ import annotations

from torch import Tensor


def reference_compact(out: Tensor, out_rows: Tensor, source: Tensor, source_rows: Tensor) -> None:
    """Shapes as in `compact`."""
    if source.dim() == out.dim():
        moved = source.index_select(0, source_rows)
    else:
        # one index per dimension: flattening a strided chunk would copy it whole
        _, heads, length = source.shape[:3]
        segment = source_rows // length
        moved = source[segment // heads, segment % heads, source_rows % length]
    out.index_copy_(0, out_rows, moved.to(out.dtype))
