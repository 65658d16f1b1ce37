"""A policy around another one."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from kvpolicy.plugins import plugin_call
from kvpolicy.plugins.decode_step import DecodeStep
from kvpolicy.plugins.registry import registry
from kvpolicy.plugins.roles import EvictionPolicy


@dataclass(frozen=True)
class WrappingPolicy(EvictionPolicy):
    """The base of a policy that scores by what another policy says.

    It says of itself what the inner policy says, and rescores a decoding step as that does; `score_prompt` is left to
    the subclass, which asks `self.policy`. What it requires besides it adds to `requires`. The inner policy is built
    through the registry, and a plan stores its name and parameters.

    inner:        the name of the inner policy
    inner_params: its parameters; those that are missing keep their defaults

    Raises `PluginError` for a policy or parameters that do not exist.
    """

    inner: str = "snapkv"
    inner_params: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _ = self.policy  # what cannot be built is refused now

    @cached_property
    def policy(self) -> EvictionPolicy:
        """The inner one."""
        return registry.create("policy", self.inner, self.inner_params)

    @property
    def requires(self) -> frozenset[str]:  # type: ignore[override]
        return self.policy.requires

    @property
    def window_rule(self) -> bool:  # type: ignore[override]
        return self.policy.window_rule

    @property
    def rescores(self) -> bool:
        return self.policy.rescores

    @property
    def new_entry_score(self) -> float:  # type: ignore[override]
        return self.policy.new_entry_score

    @property
    def num_sink_tokens(self) -> int:  # type: ignore[override]
        return self.policy.num_sink_tokens

    @property
    def recent_window(self) -> int:  # type: ignore[override]
        return self.policy.recent_window

    @property
    def observation_window(self) -> int:  # type: ignore[override]
        return self.policy.observation_window

    @property
    def attention_power(self) -> float:  # type: ignore[override]
        return self.policy.attention_power

    @property
    def repeat_chunk(self) -> int:  # type: ignore[override]
        return self.policy.repeat_chunk

    @property
    def least_capacity(self) -> int:
        return self.policy.least_capacity

    def score_step(self, step: DecodeStep) -> Tensor:
        return plugin_call.step_scores(self.policy, step)
