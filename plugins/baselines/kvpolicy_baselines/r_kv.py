"""R-KV: keep what is attended to and not said twice, for long generated output.

Source: R-KV, arXiv:2505.24133; Zefan-Cai/R-KV, rkv/compression/r1_kv.py and rkv/utils.py. Different on purpose:

- The source compresses after every 128 decoded tokens. Here the capacity holds at every step, so every step scores:
  importance is an average over the last queries with fading weights, and redundancy is the mean cosine with all keys
  held, which costs no more than reading them. A step leaves no pair out and does not pool.
- Importance is the attention of the cache: summed over the group, over all entries, then normalised to those in front
  of the window. The source takes the largest logit of the group, and its softmax runs over those in front alone.
- Pooling is over neighbours by position. The source's neighbours are those in its cache, which lie in the order of the
  scores once it has compressed.
- A key without others like it leaves no cosine out. In the source it leaves out that with the first key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from kvpolicy import DecodeStep, EvictionPolicy, LayerActivations, PluginError
from kvpolicy_baselines.pooling import pooled

_UNSCORED = 1e30  # of entries in the window, which go last
_BLOCK = 2**24  # cosines held at a time


@dataclass(frozen=True, slots=True)
class RKVPolicy(EvictionPolicy):
    """An entry's score is `mix * importance - (1 - mix) * redundancy`, both in units of an even share.

    Importance is attention of the last queries, pooled over neighbours. Redundancy grows with the mean cosine of the
    entry's key and the others, except that the most recent of those alike is spared. The window has no score and stays.

    mix:                weight of importance, in [0, 1]
    kernel_size:        positions that are pooled in a prompt, odd; 1 pools nothing
    threshold:          cosine above which keys are alike
    observation_window: queries that are asked; in decoding each weighs 1 / observation_window less than the next
    recent_window:      last positions that are never evicted; in the source the same number
    num_sink_tokens:    first positions that are never evicted; the source protects none
    """

    requires: ClassVar[frozenset[str]] = frozenset({"positions", "keys", "window_attention", "decode_attention"})

    mix: float = 0.1
    kernel_size: int = 7
    threshold: float = 0.5
    observation_window: int = 8
    recent_window: int = 8
    num_sink_tokens: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.mix <= 1:
            raise PluginError(f"r_kv: mix must lie in [0, 1], got {self.mix}")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise PluginError(f"r_kv: kernel_size must be odd and at least 1, got {self.kernel_size}")
        if not 0 <= self.threshold <= 1:
            raise PluginError(f"r_kv: threshold must lie in [0, 1], got {self.threshold}")
        if self.observation_window < 1:
            raise PluginError(f"r_kv: observation_window must be at least 1, got {self.observation_window}")

    def score_prompt(self, activations: LayerActivations) -> Tensor:
        mass, positions, keys = activations.window_attention, activations.positions, activations.keys
        positions, absent = positions.long(), positions < 0
        window = positions > positions.amax((1, 2), keepdim=True) - self.observation_window
        front = mass.float().masked_fill(window | absent, 0.0)
        importance = pooled(front, positions, self.kernel_size, "max") / _or_one(front.sum(2, keepdim=True))
        units = normalize(keys.float().masked_fill(absent[..., None], 0.0), dim=-1)  # absent ones may hold NaN
        cosines = _with_others(units, units.sum(2, keepdim=True)) - _spared(units, positions, self.threshold)
        count = (~absent).sum(2, keepdim=True).clamp(min=1)
        likeness = (cosines / count).exp().masked_fill(absent, 0.0)
        redundancy = likeness / _or_one(likeness.sum(2, keepdim=True))
        return self._mixed(importance, redundancy, count).masked_fill(window & ~absent, _UNSCORED)

    def score_step(self, step: DecodeStep) -> Tensor:
        count, seen = step.at_segment(step.lengths), step.seen[step.segment // step.num_kv_heads]
        window = step.positions >= seen - self.observation_window
        importance = _share(step, step.attention.masked_fill(window, 0.0))
        units = normalize(step.keys.float(), dim=-1)
        likeness = (_with_others(units, step.at_segment(step.total(units))) / count).exp()
        now = self._mixed(importance, _share(step, likeness), count)
        average = step.scores + (now - step.scores) / self.observation_window
        return torch.where(step.scores < _UNSCORED, average, now).masked_fill(window, _UNSCORED)

    def _mixed(self, importance: Tensor, redundancy: Tensor, count: Tensor) -> Tensor:
        """Both sum up to about 1; times the number of entries, so that scores of few and of many compare."""
        return count * (self.mix * importance - (1 - self.mix) * redundancy)


def _with_others(units: Tensor, total: Tensor) -> Tensor:
    """The sum of each key's cosines with the others. units: `[..., D]`, normalised;  total: their sum."""
    return (units * total).sum(-1) - units.square().sum(-1)


def _share(step: DecodeStep, values: Tensor) -> Tensor:
    """Each entry's part of its segment's sum. values: float `[R]`."""
    return values / step.at_segment(_or_one(step.total(values)))


def _or_one(total: Tensor) -> Tensor:
    return total.where(total > 0, 1.0)


def _spared(units: Tensor, positions: Tensor, threshold: float) -> Tensor:
    """For each entry the sum of its cosines with those whose most recent like it is, `[B, H, n]`.

    units: `[B, H, n, D]`, normalised keys, 0 where absent. Quadratic in time, in blocks of rows.
    """
    columns = torch.arange(units.shape[2], device=units.device)
    spared = units.new_zeros(units.shape[:3])
    for rows in torch.split(columns, max(1, _BLOCK // spared.numel())):
        cosines = units[:, :, rows] @ units.mT
        alike = (cosines > threshold) & (rows[:, None] != columns)
        latest = positions[:, :, None].where(alike, -1).argmax(3, keepdim=True)
        cosine = cosines.gather(3, latest).masked_fill(~alike.gather(3, latest), 0.0)
        spared.scatter_add_(2, latest[..., 0], cosine[..., 0])
    return spared
