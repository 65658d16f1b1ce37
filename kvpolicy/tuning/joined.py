"""Two probes as one: text and needles under the objective `mixed`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kvpolicy.errors import BudgetError, PluginError
from kvpolicy.integrations.transformers import SequenceProbe
from kvpolicy.plugins.roles import ScoreBias, SoftTarget
from kvpolicy.tuning.several_probes import SeveralProbes


class JoinedProbe(SeveralProbes):
    """The sequences of two probes, mixed evenly. Losses are weighted: on average over all sequences each probe has
    half of the weight, whatever their numbers.

    parts: probes of one model, one policy and one context length; prompts and activations are those of the first

    Raises `BudgetError` for probes that a table of capacities cannot serve alike.
    """

    def __init__(self, *parts: SequenceProbe) -> None:
        first, second = parts
        for name in ("spec", "context_length", "least_capacity"):
            if getattr(first, name) != getattr(second, name):
                raise BudgetError(
                    f"two probes are joined under one table of capacities, but their {name} differs: "
                    f"{getattr(first, name)} and {getattr(second, name)}"
                )
        self.parts: Sequence[SequenceProbe] = parts
        counts = [part.num_sequences for part in parts]
        self._weights = [sum(counts) / (2 * count) for count in counts]
        places = [((index + 0.5) / count, part, index) for part, count in enumerate(counts) for index in range(count)]
        self._order = [(part, index) for _, part, index in sorted(places)]

    @property
    def context_length(self) -> int:
        return self.parts[0].context_length

    @property
    def num_sequences(self) -> int:
        return len(self._order)

    def loss(self, capacities: Tensor) -> Tensor:
        return self.joined(*(part.loss(capacities) for part in self.parts))

    def joined(self, *losses: Tensor) -> Tensor:
        """Losses of the parts' sequences, `[n]` each, weighted and in the order of this probe."""
        return torch.stack([losses[part][index] * self._weights[part] for part, index in self._order])

    def token_losses(self, capacities: Tensor) -> Iterator[Tensor]:
        """Weighted losses of one sequence after another, `[1, n]`; n is that of the part which the sequence is from.

        A search may stop after any of them and has then seen as much of one part as of the other.
        """
        rows = [_rows(part.token_losses(capacities)) for part in self.parts]
        for part, _ in self._order:
            yield next(rows[part]) * self._weights[part]

    def soft_loss(self, bias: ScoreBias, target: SoftTarget = "full", *, sequence: int | None = None) -> Tensor:
        """As in `ModelProbe`, weighted like the other losses."""
        if sequence is not None and not 0 <= sequence < self.num_sequences:
            raise PluginError(f"soft_loss: there are {self.num_sequences} sequences, from 0; got {sequence}")
        places = self._order if sequence is None else [self._order[sequence]]
        return torch.cat(
            [self.parts[part].soft_loss(bias, target, sequence=index) * self._weights[part] for part, index in places]
        )


def _rows(batches: Iterator[Tensor]) -> Iterator[Tensor]:
    for batch in batches:
        yield from torch.split(batch, 1)
