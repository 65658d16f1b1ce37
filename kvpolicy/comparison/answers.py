"""A registered task over compressed contexts: what is generated behind each, and how right it is."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvpolicy.comparison.methods import Method
from kvpolicy.comparison.real_cache import filled_cache, ready, weighed
from kvpolicy.comparison.records import Records
from kvpolicy.comparison.task import Measured, Tables, Task
from kvpolicy.integrations.transformers import Prompts, RaggedCache, with_cache
from kvpolicy.measure.evaluation import CacheBytes
from kvpolicy.model.spec import ModelSpec
from kvpolicy.plugins import plugin_call
from kvpolicy.plugins.task_role import Sample
from kvpolicy.plugins.task_role import Task as TaskRole
from kvpolicy.tasks.question_time import QuestionTime


class AnswerTask(Task):
    """Answers that are generated greedily behind a prompt that was compressed once. Later questions and all answers are
    kept on top. A loss is 1 less the mean score of a sample's turns.

    role:     makes the samples and scores the answers
    question: "aware": the prompt is the context and the first question; "agnostic": the context alone
    records:  a file for what each sample gave, see `Records`
    settings: what must agree for a record to count, besides the task's own
    """

    def __init__(
        self,
        name: str,
        role: TaskRole,
        model: Any,
        tokenizer: Any,
        samples: Sequence[Sample],
        *,
        question: QuestionTime = "aware",
        records: Path | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        self.name, self.role, self.model, self.tokenizer = name, role, model, tokenizer
        self.samples, self.question, self.protocol = list(samples), question, f"question-{question}"
        self.prompts = [torch.tensor([self._prompt(sample)]) for sample in self.samples]
        self.context, self.count = self.prompts[0].shape[1], len(self.samples)
        self.spec = ModelSpec.from_config(model.config)
        self.records = Records(records, self.settings | (settings or {}))
        self._ready: Prompts | None = None

    @property
    def described(self) -> str:
        lengths = [prompt.shape[1] for prompt in self.prompts]
        tokens = f"{min(lengths)} to {max(lengths)}" if min(lengths) < max(lengths) else str(lengths[0])
        what = "a context and its question" if self.question == "aware" else "a context before its question"
        return (
            f"{what}, {tokens} tokens, compressed once; what follows is kept on top, answers are greedy, and the score "
            f"is {self.role.metric} over {self.count} samples"
        )

    @property
    def tokens(self) -> Tensor:
        """int64 [1, T], every token of every sample, one behind the other."""
        parts = [[*sample.context, *(token for ids in sample.questions for token in ids)] for sample in self.samples]
        return torch.tensor([[token for part in parts for token in part]])

    @property
    def settings(self) -> dict[str, Any]:
        turns = repr([sample.turns for sample in self.samples])
        return super().settings | {
            "metric": self.role.metric,
            "max_new_tokens": self.role.max_new_tokens,
            "samples": self.count,
            "answers_sha256": hashlib.sha256(turns.encode()).hexdigest(),
        }

    def measure(self, method: Method, tables: Tables) -> Measured:
        losses, weights = [], []
        for index, sample in enumerate(self.samples):
            table = tables(self.prompts[index].shape[1])
            record = self.records.find(method, table, index) or self._record(index, sample, method, table)
            losses.append(1 - sum(record["scores"]) / len(record["scores"]))
            weights.append([record["bytes"], record["dense_bytes"], record["entries"]])
        mean = torch.tensor(weights, dtype=torch.float64).mean(0).round().long().tolist()
        return Measured(torch.tensor(losses, dtype=torch.float64), CacheBytes(*mean))

    def decode_ms(self, method: Method, table: Tensor) -> float:
        from kvpolicy.comparison.real_cache import decode_ms

        return decode_ms(self.model, method, table, self.prompts[0], self.tokenizer)

    def _prompt(self, sample: Sample) -> tuple[int, ...]:
        """What is compressed."""
        return sample.context if self.question == "agnostic" else (*sample.context, *sample.questions[0])

    def _record(self, index: int, sample: Sample, method: Method, table: Tensor) -> dict[str, Any]:
        with ready(self.model, method):
            cache, logits = self._compressed(index, method, table)
            weight = weighed(cache, table.clamp(max=self.prompts[index].shape[1]), self.spec, self.dtype)
            if isinstance(cache, RaggedCache):
                most = len(sample.questions) * self.role.max_new_tokens
                cache.hold(most + sum(map(len, sample.questions)))
            answers = self._answers(cache, logits, sample)
        scores = [
            plugin_call.answer_score(self.role, answer, turn)
            for answer, turn in zip(answers, sample.turns, strict=True)
        ]
        values = {"answers": answers, "scores": scores, "about": dict(sample.about), "tokens": sample.length}
        values |= {"bytes": weight.bytes, "dense_bytes": weight.dense_bytes, "entries": weight.entries}
        return self.records.add(method, table, index, values)

    def _compressed(self, index: int, method: Method, table: Tensor) -> tuple[Any, Tensor]:
        """The cache of a prompt, and the logits behind it. One run of a prompt serves every table of a policy."""
        if method.quantized:
            return filled_cache(self.model, method, table, self.prompts[index])
        if self._ready is None or self._ready.policy != method.policy:
            self._ready = None  # frees its caches first
            self._ready = Prompts(self.model, self.prompts, method.policy, self.tokenizer)
        return self._ready.compressed(index, table, method.runtime_allocator)

    def _answers(self, cache: Any, logits: Tensor, sample: Sample) -> list[str]:
        """One for each turn; each stays in the conversation."""
        answers, ends, pending = [], self._ends(), list[int]()
        for turn, question in enumerate(sample.questions):
            if turn or self.question == "agnostic":
                logits = self._fed(cache, [*pending, *question])
            tokens = [int(logits[0, -1].argmax())]
            while tokens[-1] not in ends and len(tokens) < self.role.max_new_tokens:
                logits = self._fed(cache, tokens[-1:])
                tokens.append(int(logits[0, -1].argmax()))
            pending = tokens[-1:] if tokens[-1] not in ends else []
            answers.append(self.tokenizer.decode(tokens, skip_special_tokens=True))
        return answers

    def _fed(self, cache: Any, ids: list[int]) -> Tensor:
        logits: Tensor = self.model(
            torch.tensor([ids], device=self.model.device), **with_cache(self.model, cache), use_cache=True
        ).logits
        return logits

    def _ends(self) -> set[int]:
        ends = self.model.generation_config.eos_token_id
        return set(ends) if isinstance(ends, list) else {ends}
