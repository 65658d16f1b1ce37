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

from kvpolicy_kernels.ragged_attention.reference import segment_list

SHORTEST_PART = 512  # entries; below it a second thread gains no more than the merge costs


class _Run(NamedTuple):
    """Neighbouring segments of one length, whose starts lie `step` rows apart."""

    first: int
    end: int
    start: int
    step: int
    length: int


def decode_ragged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    lengths: Tensor,
    scale: float,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Shapes as in `ragged_attention`, with Dv = D."""
    batch, num_q_heads, n, dim = query.shape
    segments = segment_list(starts, lengths, keys.shape[0])
    runs = list(_runs(segments))
    parts = _num_parts(runs)
    q = query.reshape(len(segments), 1, -1, dim)  # [segments, 1, group * n, D]
    o, lse = zip(*(_attend(q[run.first : run.end], keys, values, run, parts, scale) for run in runs), strict=True)
    out = torch.cat(o)
    if sink_logits is not None:
        sinks = sink_logits[None, :, None].expand(batch, num_q_heads, n).reshape(len(segments), 1, -1)
        out = _merge(out, torch.cat([torch.cat(lse), sinks.to(lse[0].dtype)], 1))
    elif parts > 1:
        out = _merge(out, torch.cat(lse))
    return out.view(batch, num_q_heads, n, dim)


def _runs(segments: Sequence[tuple[int, int]]) -> Iterator[_Run]:
    first = 0
    while first < len(segments):
        start, length = segments[first]
        end = first + 1
        step = max(segments[end][0] - start, 0) if end < len(segments) else 0
        while end < len(segments) and segments[end] == (start + (end - first) * step, length):
            end += 1
        yield _Run(first, end, start, step, length)
        first = end


def _num_parts(runs: Sequence[_Run]) -> int:
    """As few parts a segment as give the threads equal work in every run, if the longest segment is worth it."""
    threads = torch.get_num_threads()
    wanted = threads // gcd(threads, *(run.end - run.first for run in runs))
    return max(1, min(wanted, max(run.length for run in runs) // SHORTEST_PART))


def _attend(q: Tensor, keys: Tensor, values: Tensor, run: _Run, parts: int, scale: float) -> tuple[Tensor, Tensor]:
    """q: [segments, 1, rows, D]. Returns each part's attention, [segments, parts, rows, D], and log-sum-exp."""
    count, _, rows, dim = q.shape
    if run.length == 0:
        return q.new_zeros((count, parts, rows, dim)), q.new_zeros((count, parts, rows), dtype=torch.float32)
    used = min(parts, run.length)
    # equal distances, so each part but the first begins with the last `overlap` rows of the one before
    cut, overlap = divmod(run.length, used)
    size, stride = (count, used, cut + overlap, dim), (run.step * dim, cut * dim, dim, 1)
    mask = None
    if overlap:
        mask = q.new_zeros(1, used, 1, cut + overlap)
        mask[:, 1:, :, :overlap] = float("-inf")
        mask = mask.expand(count, -1, rows, -1)
    o, lse = torch._scaled_dot_product_flash_attention_for_cpu(
        q.expand(-1, used, -1, -1),
        keys.as_strided(size, stride, keys.storage_offset() + run.start * dim),
        values.as_strided(size, stride, values.storage_offset() + run.start * dim),
        attn_mask=mask,
        scale=scale,
    )
    if used < parts:
        o, lse = F.pad(o, (0, 0, 0, 0, 0, parts - used)), F.pad(lse, (0, 0, 0, parts - used), value=float("-inf"))
    return o, lse


def _merge(o: Tensor, lse: Tensor) -> Tensor:
    """o: [segments, parts, rows, D]; lse: [segments, parts or one more, rows], the last a sink with a zero value."""
    weights = torch.softmax(lse, 1)[:, : o.shape[1], :, None]
    return (o * weights).sum(1).to(o.dtype)
