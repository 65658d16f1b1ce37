"""What is measured: one number for each sequence, smaller is better, over a cache that keeps a table of capacities."""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvpolicy.comparison.methods import Method
from kvpolicy.comparison.real_cache import decode_ms, filled_cache, ready, weighed
from kvpolicy.integrations.transformers import PromptProbe, Prompts, with_cache
from kvpolicy.integrations.transformers.probes.base import losses_from
from kvpolicy.measure.evaluation import CacheBytes, measured_bytes
from kvpolicy.model.spec import ModelSpec
from kvpolicy.tasks.questions import Question, recalled


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """losses: float64 `[n]`, one for each sequence;  memory: of one real cache after the prompt."""

    losses: Tensor
    memory: CacheBytes


Tables = Callable[[int], Tensor]
"""Capacities, int64 `[L, H]`, for a prompt of so many tokens."""


class Task(abc.ABC):
    """A prompt for each sequence, compressed once to a table of capacities, and what comes of it.

    name:     as the command line knows it
    protocol: "prompt", or "window" where every token is decoded under the budget
    model:    of transformers
    spec:     the model's
    context:  tokens of every prompt, for which a table is
    count:    sequences
    tokenizer: the model's, for a policy that has prompts repeated
    """

    name: str
    protocol: str = "prompt"
    model: Any
    spec: ModelSpec
    context: int
    count: int
    tokenizer: Any = None

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    @abc.abstractmethod
    def described(self) -> str:
        """What is measured, in words."""

    @property
    @abc.abstractmethod
    def tokens(self) -> Tensor:
        """int64 [N, T], every token that is fed or scored."""

    @property
    def steps(self) -> int:
        """Steps of progress that a measurement takes. The task tells of all but the last itself."""
        return 1

    @property
    def settings(self) -> dict[str, Any]:
        """What must agree for two runs to be one comparison, as JSON values."""
        return {
            "task": self.name,
            "protocol": self.protocol,
            "prompt_length": self.context,
            "sequences": list(self.tokens.shape),
            "tokens_sha256": hashlib.sha256(self.tokens.numpy().tobytes()).hexdigest(),
            "config_sha256": self.spec.config_sha256,
        }

    @abc.abstractmethod
    def measure(self, method: Method, tables: Tables) -> Measured:
        """Under one method's capacities. Raises what caches raise."""

    def decode_ms(self, method: Method, table: Tensor) -> float:
        """Milliseconds of a token decoded behind the first prompt, over one method's cache."""
        return decode_ms(self.model, method, table, self.tokens[:1, : self.context], self.tokenizer)


class PerplexityTask(Task):
    """The loss of the text behind a compressed prompt (`PromptProbe`), the same protocol for every policy.

    sequences: int64 [N, T];  prefill_length: tokens of the prompt, None for half of a sequence
    tokenizer: for a policy that has prompts repeated
    """

    name = "perplexity"

    def __init__(
        self, model: Any, sequences: Tensor, *, prefill_length: int | None, batch_size: int = 1, tokenizer: Any = None
    ) -> None:
        self.model, self.sequences, self.batch_size, self.tokenizer = model, sequences, batch_size, tokenizer
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

    def measure(self, method: Method, tables: Tables) -> Measured:
        table = tables(self.context)
        if method.quantized:
            return self._quantized(method, table)
        probe = self._probe_for(method)
        return Measured(probe.loss(table), measured_bytes(probe, table))

    def _quantized(self, method: Method, table: Tensor) -> Measured:
        """The same losses over caches of transformers, one sequence at a time: a batch might share its scales."""
        losses, memory, length = [], None, self.context
        for ids in torch.split(self.sequences.to(self.model.device), 1):
            with ready(self.model, method):
                cache, logits = filled_cache(self.model, method, table, ids[:, :length])
                memory = memory or weighed(cache, table, self.spec, self.dtype)
                behind = self.model(ids[:, length:-1], **with_cache(self.model, cache), use_cache=True).logits
            targets = ids[:, length:]
            own = [losses_from(logits, targets[:, :1]), losses_from(behind, targets[:, 1:])]
            losses.append(torch.cat(own, 1).double().mean(1).cpu())
        assert memory is not None
        return Measured(torch.cat(losses), memory)

    def _probe_for(self, method: Method) -> PromptProbe:
        """The last probe again where only the table is another: it has run its prompts already."""
        last, allocator = self._probe, method.runtime_allocator
        if last is None or differs(last, method) or last.allocator != allocator:
            self._probe = None  # frees its prompts first
            self._probe = PromptProbe(
                self.model,
                self.sequences,
                policy=method.policy,
                prefill_length=self.context,
                batch_size=self.batch_size,
                allocator=allocator,
                tokenizer=self.tokenizer,
                entry_format=method.entry_format,
                shared_layers=method.shared_layers,
            )
        assert self._probe is not None
        return self._probe


def differs(last: PromptProbe | Prompts, method: Method) -> bool:
    """Whether prompts that have been run are of no use for a method."""
    names = "policy", "entry_format", "shared_layers"
    return any(getattr(last, name) != getattr(method, name) for name in names)


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
        self._prompts: Prompts | None = None

    @property
    def described(self) -> str:
        return (
            f"a number in a prompt of {self.context} tokens, question included, which is compressed once; the score is "
            "the part of the prompts whose number is generated exactly"
        )

    @property
    def tokens(self) -> Tensor:
        return torch.stack([question.ids for question in self.questions])

    def measure(self, method: Method, tables: Tables) -> Measured:
        wrong, memory, table = [], None, tables(self.context)
        size = 1 if method.quantized else self.batch_size  # a batch might share its scales
        for index, first in enumerate(range(0, self.count, size)):
            batch = self.questions[first : first + size]
            answers, own = self._answers(index, method, table)
            memory = memory or own
            wrong += [float(recalled(text) != question.answer) for text, question in zip(answers, batch, strict=True)]
        assert memory is not None
        return Measured(torch.tensor(wrong, dtype=torch.float64), memory)

    def _answers(self, index: int, method: Method, table: Tensor) -> tuple[list[str], CacheBytes]:
        """What is generated greedily behind each prompt of a batch, and what the mean row's cache holds."""
        with ready(self.model, method):
            if method.quantized:
                cache, logits = filled_cache(self.model, method, table, self.tokens[index : index + 1])
            else:
                cache, logits = self._prompts_for(method).compressed(index, table, method.runtime_allocator)
            memory = weighed(cache, table, self.spec, self.dtype)
            tokens = [logits.argmax(-1)]
            for _ in range(max(question.answer_tokens for question in self.questions) - 1):
                logits = self.model(tokens[-1], **with_cache(self.model, cache), use_cache=True).logits[:, -1:]
                tokens.append(logits.argmax(-1))
        return self.tokenizer.batch_decode(torch.cat(tokens, 1).cpu(), skip_special_tokens=True), memory

    def _prompts_for(self, method: Method) -> Prompts:
        """The last ones again under the same policy: they have been run already."""
        if self._prompts is None or differs(self._prompts, method):
            self._prompts = None  # frees their caches first
            self._prompts = Prompts(
                self.model,
                torch.split(self.tokens, self.batch_size),
                method.policy,
                self.tokenizer,
                entry_format=method.entry_format,
                shared_layers=method.shared_layers,
            )
        return self._prompts
