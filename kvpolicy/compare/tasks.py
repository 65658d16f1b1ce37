"""What is measured: one number for each sequence, smaller is better, over a cache that keeps a table of capacities."""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvpolicy.compare.methods import Method
from kvpolicy.errors import BudgetError
from kvpolicy.evaluate import CacheBytes, measured_bytes
from kvpolicy.integrations.transformers import PromptProbe, attached, prompt_cache, repeat_context
from kvpolicy.retrieval import Question, recalled
from kvpolicy.spec import ModelSpec


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """losses: float64 `[n]`, one for each sequence;  held: of one real cache after the prompt."""

    losses: Tensor
    held: CacheBytes


class Task(abc.ABC):
    """A prompt for each sequence, compressed once to a table of capacities, and what comes of it.

    name:    as the command line knows it
    spec:    the model's
    context: tokens of every prompt, for which a table is
    count:   sequences
    """

    name: str
    spec: ModelSpec
    context: int
    count: int

    @property
    @abc.abstractmethod
    def described(self) -> str:
        """What is measured, in words."""

    @property
    @abc.abstractmethod
    def tokens(self) -> Tensor:
        """int64 [N, T], every token that is fed or scored."""

    @property
    def settings(self) -> dict[str, Any]:
        """What must agree for two runs to be one comparison, as JSON values."""
        return {
            "task": self.name,
            "prompt_length": self.context,
            "sequences": list(self.tokens.shape),
            "tokens_sha256": hashlib.sha256(self.tokens.numpy().tobytes()).hexdigest(),
            "config_sha256": self.spec.config_sha256,
        }

    @abc.abstractmethod
    def measure(self, method: Method, table: Tensor) -> Measured:
        """Under one method's capacities, int64 `[L, H]`. Raises what caches raise."""


class PerplexityTask(Task):
    """The loss of the text behind a compressed prompt (`PromptProbe`), the same protocol for every policy.

    sequences: int64 [N, T];  prefill_length: tokens of the prompt, None for half of a sequence
    """

    name = "perplexity"

    def __init__(self, model: Any, sequences: Tensor, *, prefill_length: int | None, batch_size: int = 1) -> None:
        self.model, self.sequences, self.batch_size = model, sequences, batch_size
        self.context = sequences.shape[1] // 2 if prefill_length is None else prefill_length
        self.count, self.spec = len(sequences), ModelSpec.from_config(model.config)
        self._probe: PromptProbe | None = None

    @property
    def described(self) -> str:
        behind = self.sequences.shape[1] - self.context
        return f"a prompt of {self.context} tokens is compressed once; the {behind} tokens behind it are scored"

    @property
    def tokens(self) -> Tensor:
        return self.sequences

    def measure(self, method: Method, table: Tensor) -> Measured:
        probe = self._probe_for(method)
        return Measured(probe.loss(table), measured_bytes(probe, table))

    def _probe_for(self, method: Method) -> PromptProbe:
        """The last probe again where only the table is another: it has run its prompts already."""
        last, allocator = self._probe, method.runtime_allocator
        if last is None or last.policy != method.policy or last.allocator != allocator:
            self._probe = None  # frees its prompts first
            self._probe = PromptProbe(
                self.model,
                self.sequences,
                policy=method.policy,
                prefill_length=self.context,
                batch_size=self.batch_size,
                allocator=allocator,
            )
        assert self._probe is not None
        return self._probe


class RetrievalTask(Task):
    """Whether a number that stands somewhere in a prompt is said at its end: 0 where it is, 1 where it is not.

    name:      of `RETRIEVAL`
    questions: prompts of equal length
    """

    def __init__(
        self, name: str, model: Any, tokenizer: Any, questions: Sequence[Question], *, batch_size: int = 1
    ) -> None:
        self.name, self.model, self.tokenizer, self.questions = name, model, tokenizer, list(questions)
        self.context, self.count, self.batch_size = len(questions[0].ids), len(questions), batch_size
        self.spec = ModelSpec.from_config(model.config)

    @property
    def described(self) -> str:
        return (
            f"a number in a prompt of {self.context} tokens, question included, which is compressed once; the score is "
            "the part of the prompts whose number is generated exactly"
        )

    @property
    def tokens(self) -> Tensor:
        return torch.stack([each.ids for each in self.questions])

    def measure(self, method: Method, table: Tensor) -> Measured:
        wrong, held = [], None
        for first in range(0, self.count, self.batch_size):
            batch = self.questions[first : first + self.batch_size]
            answers, weighed = self._answers(torch.stack([each.ids for each in batch]), method, table)
            held = held or weighed
            wrong += [float(recalled(said) != each.answer) for said, each in zip(answers, batch, strict=True)]
        assert held is not None
        return Measured(torch.tensor(wrong, dtype=torch.float64), held)

    def _answers(self, ids: Tensor, method: Method, table: Tensor) -> tuple[list[str], CacheBytes]:
        """What is generated greedily behind each prompt, and what the mean row's cache holds. ids: int64 [B, T]."""
        with torch.no_grad(), attached(self.model):
            cache = prompt_cache(self.model, method.policy, table, method.runtime_allocator)
            options = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
            ids = ids.to(self.model.device)
            token = self.model(ids, **options).logits[:, -1:].argmax(-1)
            if cache.awaits_repeat:
                repeat_context(self.model, cache, ids, self.tokenizer)
            cache.check_enforced()
            held = _weighed(cache.opened(), table)
            said = [token]
            for _ in range(max(each.answer_tokens for each in self.questions) - 1):
                said.append(self.model(said[-1], **options).logits[:, -1:].argmax(-1))
        return self.tokenizer.batch_decode(torch.cat(said, 1).cpu(), skip_special_tokens=True), held


def _weighed(store: Any, table: Tensor) -> CacheBytes:
    """The mean row's bytes of a filled store. Raises `BudgetError` if a row does not hold as much as the table says."""
    held, rows = store.lengths.sum((0, 2)).tolist(), store.batch_size
    if held != [int(table.sum())] * rows:
        raise BudgetError(f"the cache holds {held} entries in its rows, the table says {int(table.sum())}")
    return CacheBytes(store.nbytes // rows, store.dense_nbytes // rows, held[0])
