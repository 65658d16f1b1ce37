"""Eviction policies for tests: each asks for other sources."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvpolicy import EvictionPolicy


@dataclass(frozen=True, slots=True)
class Recent(EvictionPolicy):
    """The window rule."""

    window_rule: ClassVar[bool] = True
    requires: ClassVar[frozenset[str]] = frozenset({"positions"})
    num_sink_tokens: int = 2

    def score_prompt(self, activations):
        return activations.positions.float()


@dataclass(frozen=True, slots=True)
class ValueNorm(EvictionPolicy):
    requires: ClassVar[frozenset[str]] = frozenset({"values"})
    num_sink_tokens: int = 2
    recent_window: int = 0

    def score_prompt(self, activations):
        return activations.values.float().norm(dim=-1)


@dataclass(frozen=True, slots=True)
class Repeated(EvictionPolicy):
    """What the model looks at while it repeats its context."""

    requires: ClassVar[frozenset[str]] = frozenset({"repeat_attention"})
    num_sink_tokens: int = 2
    recent_window: int = 0

    def score_prompt(self, activations):
        return activations.repeat_attention


@dataclass(frozen=True, slots=True)
class KeyNorm(EvictionPolicy):
    """Prefers small keys, and lets a decoded token compete from the start."""

    requires: ClassVar[frozenset[str]] = frozenset({"keys"})
    new_entry_score: ClassVar[float] = -3.0
    num_sink_tokens: int = 1
    recent_window: int = 0

    def score_prompt(self, activations):
        return -activations.keys.float().norm(dim=-1)


@dataclass(frozen=True, slots=True)
class Coarse(EvictionPolicy):
    """Few distinct scores, so that ties decide."""

    requires: ClassVar[frozenset[str]] = frozenset({"values"})
    new_entry_score: ClassVar[float] = 0.0
    num_sink_tokens: int = 1
    recent_window: int = 0

    def score_prompt(self, activations):
        return activations.values[..., 0].round()


@dataclass(frozen=True, slots=True)
class HeavyHitter(EvictionPolicy):
    """Attention of all queries so far, summed (H2O)."""

    requires: ClassVar[frozenset[str]] = frozenset({"scores", "full_attention", "decode_attention"})
    new_entry_score: ClassVar[float] = 0.0
    num_sink_tokens: int = 0
    recent_window: int = 0

    def score_prompt(self, activations):
        return activations.scores + activations.full_attention

    def score_step(self, step):
        return step.scores + step.attention


@dataclass(frozen=True, slots=True)
class LastQueries(EvictionPolicy):
    """Attention of the observation window (SnapKV)."""

    requires: ClassVar[frozenset[str]] = frozenset({"window_attention"})
    num_sink_tokens: int = 1
    recent_window: int = 3
    observation_window: int = 3

    def score_prompt(self, activations):
        return activations.window_attention


def oracle_scores(policy, row, head, positions, mass, window_mass):
    """{position: score} after a prompt, in plain Python. mass, window_mass: {position: attention}."""
    k, v = row.key[head], row.value[head]
    return {
        Recent: lambda: {p: float(p) for p in positions},
        ValueNorm: lambda: {p: float(v[p].norm()) for p in positions},
        KeyNorm: lambda: {p: -float(k[p].norm()) for p in positions},
        Coarse: lambda: {p: float(torch.round(v[p, 0])) for p in positions},
        HeavyHitter: lambda: {p: row.kept[head].get(p, 0.0) + mass[p] for p in positions},
        LastQueries: lambda: {p: window_mass[p] for p in positions},
    }[type(policy)]()
