"""The conformance kit on what a policy's `suggest` makes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import pytest
from torch import Tensor

from kvpolicy.plugins.activations import LayerActivations
from kvpolicy.plugins.roles import EvictionPolicy, Trial
from kvpolicy.testing import check_eviction_policy
from tests.test_testing_kit import KeyPolicy, message, policy


@dataclass(frozen=True, slots=True)
class ScaledPolicy(KeyPolicy):
    """Right, with a search."""

    scale: int = 3

    def score_prompt(self, activations: LayerActivations) -> Tensor:
        return KeyPolicy.score_prompt(self, activations) * self.scale

    @classmethod
    def suggest(cls, trial: Trial) -> Self:
        return cls(scale=trial.suggest_int("scale", 1, 9))


def searched(function: Callable[[Any, Trial], object], **body: Any) -> type[EvictionPolicy]:
    return policy(ScaledPolicy, suggest=classmethod(function), **body)


def plain(cls: Any, trial: Trial) -> object:
    return cls(scale=trial.suggest_int("scale", 1, 9))


def test_a_right_policy_with_a_search_passes() -> None:
    check_eviction_policy(ScaledPolicy)
    check_eviction_policy(ScaledPolicy(scale=20))


@pytest.mark.parametrize(
    ("wrong", "law"),
    [
        (searched(lambda cls, t: cls(scale=t.suggest_int("width", 1, 9))), "'width', which is no field"),
        (searched(lambda cls, t: cls(scale=t.suggest_int("scale", 4, 9))), "outside the searched range [4, 9]"),
        (searched(lambda cls, t: cls(scale=2 * t.suggest_int("scale", 1, 9))), "holds the answers of the trial"),
        (searched(lambda cls, t: ScaledPolicy()), "suggest returns a Wrong"),
        (searched(lambda cls, t: cls(num_sink_tokens=-t.suggest_int("num_sink_tokens", 0, 9))), "holds the answers"),
        (searched(lambda cls, t: cls(num_sink_tokens=t.suggest_int("num_sink_tokens", -1, 9))), "is -1"),
        (searched(plain, score_prompt=lambda self, a: a.keys.norm(dim=-1)[:, : 9 - self.scale]), "shape [B, H, n]"),
        (searched(plain, window_rule=property(lambda self: self.scale == 9)), "`window_rule` is the same whatever"),
    ],
)
def test_a_wrong_suggestion_is_caught(wrong: type[EvictionPolicy], law: str) -> None:
    assert law in message(lambda: check_eviction_policy(wrong))
