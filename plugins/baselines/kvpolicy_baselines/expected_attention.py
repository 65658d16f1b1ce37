"""Expected Attention: keep what queries to come are expected to attend to.

Source: Expected Attention, arXiv:2510.00636; NVIDIA/kvpress, kvpress/presses/expected_attention_press.py. Different on
purpose:

- Queries are turned back from where RoPE has put them; the source computes them again from the hidden states.
- Logits are scaled as the model scales them; the source divides by the root of the head dimension.
- Padding and absent entries are left out. In a later chunk of a prompt the statistics are those of its own queries, and
  the source does not compress there.
- Sink tokens have no score here, as the cache protects them; the source gives them more than the largest score.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvpolicy import EvictionPolicy, LayerActivations, PluginError

_NUMBERS = 1 << 22
"""That a step of a few KV heads at a time makes: fewer and larger operations, and 17 MB in fp32."""


@dataclass(frozen=True, slots=True)
class ExpectedAttentionPolicy(EvictionPolicy):
    """An entry's score is the attention that the next queries pay it, were they like those of the prompt.

    The queries before RoPE are taken for normally distributed, and RoPE for its average over the next positions. What
    is expected is divided by its sum over the entries, averaged over the query heads of the group, and multiplied by
    the length of the value. Sink tokens are left out of all of it.

    num_future_positions: positions that RoPE is averaged over
    use_covariance:       False takes every query to come for the mean
    use_value_norm:       False leaves the lengths of the values out
    epsilon:              is added to the expected attention before it is multiplied
    num_sink_tokens:      first positions that are never evicted
    recent_window:        last positions that are never evicted
    """

    requires: ClassVar[frozenset[str]] = frozenset({"queries", "keys", "values", "positions", "rotary", "scale"})

    num_future_positions: int = 512
    use_covariance: bool = True
    use_value_norm: bool = True
    epsilon: float = 0.0
    num_sink_tokens: int = 4
    recent_window: int = 0

    def __post_init__(self) -> None:
        if self.num_future_positions < 1:
            raise PluginError(
                f"expected_attention: num_future_positions must be at least 1, got {self.num_future_positions}"
            )
        if not 0 <= self.epsilon < torch.inf:
            raise PluginError(f"expected_attention: epsilon must be a number of at least 0, got {self.epsilon}")

    def score_prompt(self, activations: LayerActivations) -> Tensor:
        queries, keys, values = activations.queries, activations.keys, activations.values
        positions, rotary, scale = activations.positions, activations.rotary, activations.scale
        place = positions[:, 0, -queries.shape[2] :].to(queries.device)
        cos, sin = self._to_come(place, rotary.frequencies.to(queries.device))
        counts = self._counting(place)
        left_out = positions < self.num_sink_tokens  # absent ones, at -1, too
        grouped, scores = queries.reshape(len(queries), keys.shape[1], -1, *queries.shape[2:]), []
        numbers_of_one = max(grouped[:, 0].numel(), grouped.shape[2] * keys[:, 0].numel())
        most = max(1, _NUMBERS // numbers_of_one)
        for heads in (slice(first, first + most) for first in range(0, keys.shape[1], most)):
            turned = rotary.turned(grouped[:, heads].float(), cos[:, None, None], sin[:, None, None])
            logits = self._logits(*_moments(turned, counts), keys[:, heads].float(), scale)
            scores.append(logits.masked_fill(left_out[:, heads, None], -torch.inf).softmax(-1).mean(2))
        expected = torch.cat(scores, 1)
        if self.use_value_norm:
            expected = (expected + self.epsilon) * values.float().norm(dim=-1)
        return expected.masked_fill(left_out, 0.0)  # these may be NaN

    def _to_come(self, place: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine, [B, n, P], of the average turn from each query's place to the next positions."""
        ahead = torch.arange(1, self.num_future_positions + 1, device=place.device)[:, None] * frequencies
        back = (place.amax(1, keepdim=True) - place)[..., None] * frequencies
        cos, sin = ahead.cos().mean(0), ahead.sin().mean(0)
        return back.cos() * cos - back.sin() * sin, back.sin() * cos + back.cos() * sin

    def _counting(self, place: Tensor) -> Tensor:
        """Which queries make the statistics, bool [B, n]: those behind the sink tokens, or all where there are none."""
        behind = place >= self.num_sink_tokens
        return behind.where(behind.any(1, keepdim=True), place >= 0)

    def _logits(self, mean: Tensor, covariance: Tensor, keys: Tensor, scale: float) -> Tensor:
        """The logarithm of the expected exponential, [B, H, G, N].

        mean: [B, H, G, D];  covariance: [B, H, G, D, D];  keys: [B, H, N, D]
        """
        logits = scale * (mean @ keys.mT)
        if not self.use_covariance:
            return logits
        keys = keys[:, :, None]
        return logits + scale**2 / 2 * (keys @ covariance * keys).sum(-1)


def _moments(queries: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [..., D] and covariance [..., D, D] of the queries [B, H, G, n, D] that count; counts: bool [B, n]."""
    ignored = ~counts[:, None, None, :, None]
    total = counts.sum(1).clamp(min=1)[:, None, None, None]
    mean = queries.masked_fill(ignored, 0.0).sum(3) / total
    centred = (queries - mean[..., None, :]).masked_fill(ignored, 0.0)
    return mean, centred.mT @ centred / total[..., None]
