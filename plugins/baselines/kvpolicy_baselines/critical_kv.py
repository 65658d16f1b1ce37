"""CriticalKV: half of the budget by another policy's scores, the other half by these times what a value can do.

Source: CriticalKV, arXiv:2502.03805; NVIDIA/kvpress, kvpress/presses/criticalkv_press.py. Different on purpose:

- What the cache protects (sink tokens, the recent window) fills the first half before any other entry does, whatever
  its score. In the source the window's scores are the largest.
- The first half keeps the order that the inner policy gives it, so that decoding evicts the second half first.
- Padding and absent entries are left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvpolicy import LayerActivations, PluginError, WrappingPolicy

_BLOCK = 2**24  # numbers held at a time


@dataclass(frozen=True, slots=True)
class CriticalKVPolicy(WrappingPolicy):
    """The best entries by the inner policy's scores stay first, then the best by score times the value's weight.

    A value's weight is the L1 norm of what the output projection makes of it, averaged over the query heads of the
    group: what is attended to but writes little into the residual stream is given up. Decoding scores nothing; decoded
    tokens are kept before those of the prompt.

    inner:        a policy whose scores are not negative and do not add up, such as attention
    inner_params: its parameters; sink tokens and windows are those of the inner policy
    first_stage:  part of the capacity that the inner policy's scores alone fill, in [0, 1]
    epsilon:      is added to the scores before the weight is multiplied
    """

    rescores: ClassVar[bool] = False
    new_entry_score: ClassVar[float] = math.inf

    first_stage: float = 0.5
    epsilon: float = 1e-4

    def __post_init__(self) -> None:
        if not 0 <= self.first_stage <= 1:
            raise PluginError(f"critical_kv: first_stage must lie in [0, 1], got {self.first_stage}")
        if not 0 <= self.epsilon < torch.inf:
            raise PluginError(f"critical_kv: epsilon must be a number of at least 0, got {self.epsilon}")
        WrappingPolicy.__post_init__(self)
        if self.policy.window_rule:
            raise PluginError(f"critical_kv: '{self.inner}' keeps the most recent entries and scores none")
        if "scores" in self.policy.requires:
            raise PluginError(f"critical_kv: '{self.inner}' adds up its own scores, which the two halves replace")

    @property
    def requires(self) -> frozenset[str]:  # type: ignore[override]
        return (self.policy.requires - {"decode_attention"}) | {"capacity", "values", "output_weight", "positions"}

    def score_prompt(self, activations: LayerActivations) -> Tensor:
        positions = activations.positions.long()
        absent = positions < 0
        scores = self.policy.score_prompt(activations)
        values = activations.values.masked_fill(absent[..., None], 0.0)  # they may hold NaN
        second = ((scores + self.epsilon) * _weights(values, activations.output_weight)).masked_fill(absent, 0.0)
        first_scores = scores.masked_fill(absent, -torch.inf).masked_fill(self._protected(positions), torch.inf)
        rank = _ranks(first_scores, positions)
        first = rank < (activations.capacity * self.first_stage).floor()[..., None]
        best, order = second.amax(2, keepdim=True), 2 - rank / rank.shape[2]
        return torch.where(first & ~absent, best + best.abs().clamp(min=1e-6) * order, second)

    def _protected(self, positions: Tensor) -> Tensor:
        """What stays whatever its score, bool `[B, H, n]`."""
        seen = positions.amax((1, 2), keepdim=True) + 1
        return (positions >= 0) & ((positions < self.num_sink_tokens) | (positions >= seen - self.recent_window))


def _ranks(scores: Tensor, positions: Tensor) -> Tensor:
    """The place of each entry by its score, int64 `[B, H, n]`, 0 for the largest; of equal ones the more recent."""
    order = positions.argsort(dim=2, descending=True, stable=True)
    order = order.gather(2, scores.gather(2, order).argsort(dim=2, descending=True, stable=True))
    places = torch.arange(order.shape[2], device=order.device)
    return torch.empty_like(order).scatter_(2, order, places.expand_as(order))


def _weights(values: Tensor, output_weight: Tensor) -> Tensor:
    """Mean L1 norm of each value behind the output projection, over its query heads, float32 `[B, H, n]`.

    values: `[B, H, n, Dv]`;  output_weight: `[hidden_size, num_q_heads * Dv]`. In blocks of tokens.
    """
    batch, heads, _, dim = values.shape
    group = output_weight.shape[1] // (heads * dim)
    projections = output_weight.float().view(-1, heads, group, dim).permute(1, 2, 3, 0)  # [H, G, Dv, hidden]
    tokens = max(1, _BLOCK // (batch * heads * output_weight.shape[0]))
    parts = []
    for block in torch.split(values.float(), tokens, 2):
        norms = [(block @ projections[:, index]).abs().sum(-1) for index in range(group)]
        parts.append(torch.stack(norms).mean(0))
    return torch.cat(parts, 2)
