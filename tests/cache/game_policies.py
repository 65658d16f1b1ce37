"""Policies whose scores are exact in float32, each said twice: for a store, and in plain Python for the naive model."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvpolicy import EvictionPolicy


@dataclass(frozen=True, slots=True)
class Window(EvictionPolicy):
    """The sink tokens and the most recent."""

    window_rule: ClassVar[bool] = True
    requires: ClassVar[frozenset[str]] = frozenset({"positions"})
    num_sink_tokens: int = 2
    later: ClassVar[None] = None

    def score_prompt(self, activations):
        return activations.positions.float()

    def first(self, score, key, value, position):
        return float(position)


@dataclass(frozen=True, slots=True)
class Digest(EvictionPolicy):
    """By the content of a value, in few steps: ties are common. Decoded tokens stay while anything else can go."""

    requires: ClassVar[frozenset[str]] = frozenset({"values"})
    num_sink_tokens: int = 2
    recent_window: int = 0
    later: ClassVar[None] = None

    def score_prompt(self, activations):
        return activations.values[..., 0].round()

    def first(self, score, key, value, position):
        return float(np.round(np.float32(value[0])))


@dataclass(frozen=True, slots=True)
class Keyed(EvictionPolicy):
    """By a key. A decoded token competes from the start."""

    requires: ClassVar[frozenset[str]] = frozenset({"keys"})
    new_entry_score: ClassVar[float] = 0.25
    num_sink_tokens: int = 1
    recent_window: int = 0
    later: ClassVar[None] = None

    def score_prompt(self, activations):
        return activations.keys[..., 1].clone()

    def first(self, score, key, value, position):
        return float(key[1])


@dataclass(frozen=True, slots=True)
class Fading(EvictionPolicy):
    """Rescores all entries after each chunk and after each token, from what they had, their place and their key."""

    requires: ClassVar[frozenset[str]] = frozenset({"scores", "positions", "keys"})
    new_entry_score: ClassVar[float] = 1.0
    num_sink_tokens: int = 1
    recent_window: int = 0

    def score_prompt(self, activations):
        return activations.scores * 0.5 + activations.positions % 5

    def score_step(self, step):
        return step.scores * 0.75 + step.keys[..., 0]

    def first(self, score, key, value, position):
        return float(np.float32(score) * np.float32(0.5) + np.float32(position % 5))

    def later(self, score, key, value, position):
        return float(np.float32(score) * np.float32(0.75) + np.float32(key[0]))
