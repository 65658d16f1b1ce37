"""The torch path on the CPU when every query sees its whole segment: split-K over torch's own flash attention.

One call per run of equally long, equally spaced segments. A call works on one thread per segment, so long segments are
cut into parts until the threads have equal work, and the log-sum-exps, which the public function does not return, weigh
the parts at the end. The query group is the rows of one product: a key is read once, not once per query head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import gcd
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kvpolicy_kernels.segments import Segments

SHORTEST_PART = 512  # entries; below it a second thread gains no more than the merge costs


class _Run(NamedTuple):
    """Neighbouring segments of one length, whose starts lie `step` rows apart."""

    first: int
    end: int
    start: int
    step: int
    length: int


def cpu_attention(query: Tensor, segments: Segments, scale: float, sink_logits: Tensor | None = None) -> Tensor:
    """Shapes as in `ragged_attention`, with Dv = D."""
    batch, num_q_heads, n, dim = query.shape
    bounds = segments.bounds()
    runs = list(_runs(bounds))
    parts = _num_parts(runs)
    q = query.reshape(len(bounds), 1, -1, dim)  # [segments, 1, group * n, D]
    if len(runs) == 1:
        out, lse = _attend(q, segments, runs[0], parts, scale)
    else:
        each = [_attend(q[run.first : run.end], segments, run, parts, scale) for run in runs]
        out, lse = (torch.cat(of_runs) for of_runs in zip(*each, strict=True))
    if sink_logits is not None:
        sinks = sink_logits[None, :, None].expand(batch, num_q_heads, n).reshape(len(bounds), 1, -1)
        out = _merge(out, torch.cat([lse, sinks.to(lse.dtype)], 1))
    elif parts > 1:
        out = _merge(out, lse)
    return out.view(batch, num_q_heads, n, dim)


def _runs(bounds: Sequence[tuple[int, int]]) -> Iterator[_Run]:
    """bounds: (start, length) of every segment."""
    first = 0
    while first < len(bounds):
        start, length = bounds[first]
        end = first + 1
        step = max(bounds[end][0] - start, 0) if end < len(bounds) else 0
        while end < len(bounds) and bounds[end] == (start + (end - first) * step, length):
            end += 1
        yield _Run(first, end, start, step, length)
        first = end


def _num_parts(runs: Sequence[_Run]) -> int:
    """As few parts a segment as give the threads equal work in every run, if the longest segment is worth it."""
    worth = max(run.length for run in runs) // SHORTEST_PART
    if worth < 2:
        return 1
    threads = torch.get_num_threads()
    return min(threads // gcd(threads, *(run.end - run.first for run in runs)), worth)


def _attend(q: Tensor, segments: Segments, run: _Run, parts: int, scale: float) -> tuple[Tensor, Tensor]:
    """q: [segments, 1, rows, D]. Returns each part's attention, [segments, parts, rows, D], and log-sum-exp."""
    count, _, rows, dim = q.shape
    if run.length == 0:
        return q.new_zeros((count, parts, rows, dim)), q.new_zeros((count, parts, rows), dtype=torch.float32)
    used = min(parts, run.length)
    # equal distances, so each part but the first begins with the last `overlap` rows of the one before
    cut, overlap = divmod(run.length, used)
    size = (count, used, cut + overlap, dim)
    mask = None
    if overlap:
        mask = q.new_zeros(1, used, 1, cut + overlap)
        mask[:, 1:, :, :overlap] = float("-inf")
        mask = mask.expand(count, -1, rows, -1)
    o, lse = torch._scaled_dot_product_flash_attention_for_cpu(
        q if used == 1 else q.expand(-1, used, -1, -1),
        _view(segments.keys, run, cut, size),
        _view(segments.values, run, cut, size),
        attn_mask=mask,
        scale=scale,
    )
    if used < parts:
        o, lse = F.pad(o, (0, 0, 0, 0, 0, parts - used)), F.pad(lse, (0, 0, 0, parts - used), value=float("-inf"))
    return o, lse


def _view(column: Tensor, run: _Run, cut: int, size: tuple[int, ...]) -> Tensor:
    """The rows of a run's segments, in parts that begin `cut` rows apart. column: [R, D], of keys or of values."""
    row = column.stride(0)
    return column.as_strided(size, (run.step * row, cut * row, row, 1), column.storage_offset() + run.start * row)


def _merge(o: Tensor, lse: Tensor) -> Tensor:
    """o: [segments, parts, rows, D]; lse: [segments, parts or one more, rows], the last a sink with a zero value."""
    weights = torch.softmax(lse, 1)[:, : o.shape[1], :, None]
    return (o * weights).sum(1).to(o.dtype)
