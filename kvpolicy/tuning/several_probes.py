"""Several probes as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from kvpolicy.budget.entry_format import Format
from kvpolicy.integrations.transformers import SequenceProbe
from kvpolicy.model.spec import ModelSpec
from kvpolicy.plugins.activations import LayerActivations
from kvpolicy.plugins.roles import ModelProbe
from kvpolicy.progress import Progress


class SeveralProbes(ModelProbe):
    """What probes of one model and one policy have in common; prompts and activations are those of the first."""

    parts: Sequence[SequenceProbe]

    @property
    def spec(self) -> ModelSpec:
        return self.parts[0].spec

    @property
    def entry_format(self) -> Format:
        return self.parts[0].entry_format

    @property
    def least_capacity(self) -> int:
        return self.parts[0].least_capacity

    @property
    def formats(self) -> tuple[str, ...]:
        return self.parts[0].formats

    @property
    def num_sink_tokens(self) -> int:
        return self.parts[0].num_sink_tokens

    @property
    def prompts(self) -> Sequence[Tensor]:
        return self.parts[0].prompts

    def tokenize(self, text: str) -> Tensor:
        return self.parts[0].tokenize(text)

    def observe(
        self,
        visit: Callable[[LayerActivations], None],
        requires: frozenset[str],
        *,
        prompts: Sequence[Tensor] | None = None,
        observation_window: int = 32,
    ) -> None:
        self.parts[0].observe(visit, requires, prompts=prompts, observation_window=observation_window)

    @property
    def progress(self) -> Progress:
        return self.parts[0].progress
