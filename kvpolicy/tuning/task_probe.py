"""The loss of the answers to a task's questions, each behind its own compressed prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvpolicy.budget.entries import capacities
from kvpolicy.budget.entry_format import Format
from kvpolicy.integrations.transformers import PromptProbe
from kvpolicy.integrations.transformers.probes.prefilled import KEPT_BYTES
from kvpolicy.plugins.roles import EvictionPolicy, ScoreBias, SoftTarget
from kvpolicy.tasks.known_answers import KnownAnswer
from kvpolicy.text.corpus import Tokenize
from kvpolicy.tuning.several_probes import SeveralProbes


class TaskProbe(SeveralProbes):
    """Answers behind prompts of any lengths. A table of capacities is that of the longest prompt; a shorter one gets
    the same shares of its own length.

    parts: one for the samples of each shape, in the order in which shapes come first
    """

    protocol: ClassVar[str] = "prompt"

    def __init__(
        self,
        model: Any,
        answers: Sequence[KnownAnswer],
        prompts: Sequence[Tensor] = (),
        *,
        policy: EvictionPolicy,
        tokenize: Tokenize | None = None,
        tokenizer: Any = None,
        batch_size: int = 1,
        entry_format: Format = None,
    ) -> None:
        alike: dict[tuple[int, int, int], list[KnownAnswer]] = {}
        for answer in answers:
            alike.setdefault(answer.shape, []).append(answer)
        self.answers = [answer for group in alike.values() for answer in group]
        self.parts: Sequence[PromptProbe] = [
            PromptProbe(
                model,
                torch.tensor([answer.ids for answer in group]),
                prompts,
                policy=policy,
                tokenize=tokenize,
                prefill_length=prompt,
                unscored=question,
                batch_size=batch_size,
                tokenizer=tokenizer,
                kept_bytes=KEPT_BYTES // len(alike),
                entry_format=entry_format,
            )
            for (prompt, question, _), group in alike.items()
        ]

    @property
    def described(self) -> str:
        """What `loss` measures, in words."""
        lengths = [part.prefill_length for part in self.parts]
        tokens = f"{min(lengths)} to {max(lengths)}" if min(lengths) < max(lengths) else str(lengths[0])
        return f"prompts of {tokens} tokens are compressed once each; the tokens of the answers are scored"

    @property
    def digest(self) -> str:
        """Of all tokens, and of what is compressed and scored of them."""
        return hashlib.sha256(repr([(answer.shape, answer.ids) for answer in self.answers]).encode()).hexdigest()

    @property
    def context_length(self) -> int:
        return max(part.prefill_length for part in self.parts)

    @property
    def prefill_length(self) -> int:
        """Tokens of the longest prompt."""
        return self.context_length

    @property
    def num_sequences(self) -> int:
        return len(self.answers)

    def loss(self, capacities: Tensor) -> Tensor:
        return torch.cat([part.loss(self._table(capacities, part)) for part in self.parts])

    def token_losses(self, capacities: Tensor) -> Iterator[Tensor]:
        """Losses of the answers' tokens, float32 `[batch, n]`, where n may differ from one batch to the next."""
        for part in self.parts:
            yield from part.token_losses(self._table(capacities, part))

    def soft_loss(self, bias: ScoreBias, target: SoftTarget = "full", *, sequence: int | None = None) -> Tensor:
        """As in `ModelProbe`; ranks are those of the longest prompt, of which an entry outlives the same part."""
        places = [(part, index) for part in self.parts for index in range(part.num_sequences)]
        chosen = places if sequence is None else [places[sequence]]
        return torch.cat([part.soft_loss(self._bias(bias, part), target, sequence=index) for part, index in chosen])

    def seconds(self, forward: float) -> float:
        """What a sample takes in a trial of a search, on average."""
        return sum(part.seconds(forward) * part.num_sequences for part in self.parts) / self.num_sequences

    def _table(self, table: Tensor, part: PromptProbe) -> Tensor:
        length, longest = part.prefill_length, self.context_length
        if length == longest:
            return table
        total = round(int(table.sum()) * length / longest)
        return capacities(table.double() / longest, total, length, self.least_capacity)

    def _bias(self, bias: ScoreBias, part: PromptProbe) -> ScoreBias:
        length, longest = part.prefill_length, self.context_length
        return lambda layer, rank: bias(layer, torch.where(rank < 0, rank, rank * longest // length))
