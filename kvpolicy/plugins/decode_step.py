"""What the core hands to a policy after a decoded token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvpolicy.plugins.activations import ABSENT, Sources


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class DecodeStep(Sources):
    """The rows of one layer's arena after one decoding step: R of them, each an entry's or free.

    Shapes are those of the arena, whatever it holds, so that they stay the same from step to step. A free row has
    position -1, score -inf and attention 0; its key and value are finite and mean nothing, and what is returned for it
    is ignored. Segment i belongs to sequence `i // num_kv_heads` and KV head `i % num_kv_heads`; there are S.

    num_kv_heads:  KV heads of the layer; under tensor parallelism those of this rank
    segment:       int64 [R], whose row it is, ascending; a free row has an owner too
    scores:        float32 [R];  positions: int32 [R]
    lengths:       int64 [S], entries of each segment
    seen:          int64 [B], tokens of each sequence so far, this one included
    max_positions: an int above every position
    keys, values:  [R, dim], keys after RoPE; each raises `PluginError` unless it is required
    attention:     float32 [R], mass of this step summed over the query group; as keys, for "decode_attention"
    """

    layer: int
    num_kv_heads: int
    segment: Tensor
    scores: Tensor
    positions: Tensor
    lengths: Tensor
    seen: Tensor
    max_positions: int
    keys: Tensor = ABSENT
    values: Tensor = ABSENT
    attention: Tensor = ABSENT

    def total(self, x: Tensor) -> Tensor:
        """The sum over each segment's entries: float [R, ...] to [S, ...]; 0 where there are none.

        Added up in one order: the same numbers give the same bits, on a GPU too.
        """
        if x.device.type == "cpu":
            return x.new_zeros(len(self.lengths) + 1, *x.shape[1:]).index_add(0, self._owner, x)[:-1]
        return in_blocks(x.where(self._present(x), 0.0), self.segment, len(self.lengths), "sum")

    def largest(self, x: Tensor) -> Tensor:
        """The largest of each segment's entries: float [R, ...] to [S, ...]; -inf where there are none."""
        if x.device.type == "cpu":
            owner = self._owner.view(-1, *[1] * (x.dim() - 1)).expand_as(x)
            out = x.new_full((len(self.lengths) + 1, *x.shape[1:]), -torch.inf)
            return out.scatter_reduce(0, owner, x, "amax")[:-1]
        return in_blocks(x.where(self._present(x), -torch.inf), self.segment, len(self.lengths), "max")

    def at_segment(self, y: Tensor) -> Tensor:
        """What each row's segment has: [S, ...] to [R, ...]."""
        return y[self.segment]

    @property
    def _owner(self) -> Tensor:
        """The segment of each entry; S for a free row, which counts nowhere."""
        return self.segment.where(self.positions >= 0, len(self.lengths))

    def _present(self, x: Tensor) -> Tensor:
        """Which rows are entries, to broadcast over x."""
        return (self.positions >= 0).view(-1, *[1] * (x.dim() - 1))


def in_blocks(x: Tensor, segment: Tensor, count: int, how: Literal["sum", "max"]) -> Tensor:
    """A reduction of each segment's rows, float [R, ...] to [S, ...], for a GPU: a block of threads to a segment.

    segment: int64 [R], ascending;  count: S

    Without atomics, whose order differs from run to run, and without waiting for the device. Added up in float64.
    """
    columns = x.double().reshape(len(x), -1).T  # behind each other, since only flat numbers are reduced by blocks
    ends = torch.searchsorted(segment, torch.arange(count, device=x.device), right=True)
    ends = ends + len(x) * torch.arange(len(columns), device=x.device)[:, None]
    offsets = torch.cat([ends.new_zeros(1), ends.flatten()])
    initial = 0.0 if how == "sum" else -torch.inf
    flat = torch.segment_reduce(columns.flatten(), how, offsets=offsets, unsafe=True, initial=initial)
    return flat.view(-1, count).T.reshape(count, *x.shape[1:]).to(x.dtype)
