"""The probe that an estimator is given: the answers of another one, with progress and with losses known already."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from kvpolicy.measure.delegate import DelegateProbe
from kvpolicy.model.spec import Importance
from kvpolicy.plugins import plugin_call
from kvpolicy.plugins.activations import LayerActivations
from kvpolicy.plugins.roles import ImportanceEstimator, ModelProbe
from kvpolicy.progress import Progress


class KnownLosses(Protocol):
    """Keeps what `ModelProbe.loss` gave, by its capacities."""

    def find(self, capacities: Tensor) -> Tensor | None: ...
    def keep(self, capacities: Tensor, losses: Tensor) -> None: ...


def profile(
    estimator: ImportanceEstimator,
    probe: ModelProbe,
    forwards: int,
    progress: Progress,
    known: KnownLosses | None = None,
) -> Importance:
    """Runs an estimator as a stage of `forwards` steps, which is what `num_forwards` says."""
    progress.begin("profile", forwards)
    try:
        return plugin_call.importance(estimator, ProfilingProbe(probe, forwards, progress, known))
    finally:
        progress.end()


class ProfilingProbe(DelegateProbe):
    """Asks `probe`, says after each forward that it is done, and asks for no loss twice.

    forwards: how many are expected; each tenth of them is worth a line
    known:    losses of an earlier run, and where new ones are kept
    """

    def __init__(self, probe: ModelProbe, forwards: int, progress: Progress, known: KnownLosses | None = None) -> None:
        super().__init__(probe)
        self._forwards, self._stage, self._known = forwards, progress, known
        self._done = 0

    def observe(
        self,
        visit: Callable[[LayerActivations], None],
        requires: frozenset[str],
        *,
        prompts: Sequence[Tensor] | None = None,
        observation_window: int = 32,
    ) -> None:
        super().observe(visit, requires, prompts=prompts, observation_window=observation_window)
        self._advance(len(self._probe.prompts if prompts is None else prompts))

    def loss(self, capacities: Tensor) -> Tensor:
        losses = None if self._known is None else self._known.find(capacities)
        if losses is None:
            losses = self._probe.loss(capacities)
            if self._known is not None:
                self._known.keep(capacities, losses)
        self._advance(len(losses))
        return losses

    def _advance(self, count: int) -> None:
        for _ in range(count):
            tenths = 10 * self._done // max(self._forwards, 1)
            self._done += 1
            is_next = 10 * self._done // max(self._forwards, 1) > tenths and self._forwards >= 50
            self._stage.advance(f"{self._done} of {self._forwards} forwards" if is_next else "")
