"""A probe that asks another one: what it is to change is overridden."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from kvpolicy.model.spec import ModelSpec
from kvpolicy.plugins.activations import LayerActivations
from kvpolicy.plugins.layer_gradients import LayerGradients
from kvpolicy.plugins.roles import ModelProbe, ScoreBias, SoftTarget
from kvpolicy.progress import Progress


class DelegateProbe(ModelProbe):
    """Answers as `probe` does."""

    def __init__(self, probe: ModelProbe) -> None:
        self._probe = probe

    @property
    def spec(self) -> ModelSpec:
        return self._probe.spec

    @property
    def context_length(self) -> int:
        return self._probe.context_length

    @property
    def least_capacity(self) -> int:
        return self._probe.least_capacity

    @property
    def formats(self) -> tuple[str, ...]:
        return self._probe.formats

    @property
    def num_sink_tokens(self) -> int:
        return self._probe.num_sink_tokens

    @property
    def prompts(self) -> Sequence[Tensor]:
        return self._probe.prompts

    def tokenize(self, text: str) -> Tensor:
        return self._probe.tokenize(text)

    def observe(
        self,
        visit: Callable[[LayerActivations], None],
        requires: frozenset[str],
        *,
        prompts: Sequence[Tensor] | None = None,
        observation_window: int = 32,
    ) -> None:
        self._probe.observe(visit, requires, prompts=prompts, observation_window=observation_window)

    def loss(self, capacities: Tensor) -> Tensor:
        return self._probe.loss(capacities)

    @property
    def num_sequences(self) -> int:
        return self._probe.num_sequences

    def soft_loss(self, bias: ScoreBias, target: SoftTarget = "full", *, sequence: int | None = None) -> Tensor:
        return self._probe.soft_loss(bias, target, sequence=sequence)

    def observe_gradients(self, visit: Callable[[LayerGradients], None], *, sequence: int, seed: int = 0) -> None:
        self._probe.observe_gradients(visit, sequence=sequence, seed=seed)

    @property
    def num_scored(self) -> int:
        return self._probe.num_scored

    def saved(self) -> Any:
        return self._probe.saved()

    def save(self, state: Any) -> None:
        self._probe.save(state)

    @property
    def progress(self) -> Progress:
        return self._probe.progress
