"""A registered task over compressed contexts: what is generated behind each, and how right it is."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvpolicy.comparison.methods import Method
from kvpolicy.comparison.real_cache import filled_cache, ready, weighed_rows
from kvpolicy.comparison.records import Records
from kvpolicy.comparison.talk import Talk
from kvpolicy.comparison.task import Measured, Tables, Task, differs
from kvpolicy.integrations.transformers import Prompts, RaggedCache
from kvpolicy.measure.evaluation import CacheBytes
from kvpolicy.model.spec import ModelSpec
from kvpolicy.plugins import plugin_call
from kvpolicy.plugins.task_role import Sample
from kvpolicy.plugins.task_role import Task as TaskRole
from kvpolicy.progress import Progress
from kvpolicy.tasks.question_time import QuestionTime


class AnswerTask(Task):
    """Answers that are generated greedily behind a prompt that was compressed once. Later questions and all answers are
    kept on top. A loss is 1 less the mean score of a sample's turns.

    role:     makes the samples and scores the answers
    question: "aware": the prompt is the context and the first question; "agnostic": the context alone
    records:  a file for what each sample gave, see `Records`
    settings: what must agree for a record to count, besides the task's own
    facts:    what a record says of the run, besides the task's name, when the question came, and the number of samples
    batch_size: samples that are run together, left-padded; each is answered as if it were alone
    progress: is told of each sample but the last
    kept_bytes: of dense caches that are kept from one table to the next, see `Prompts`
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
        facts: dict[str, Any] | None = None,
        batch_size: int = 1,
        progress: Progress | None = None,
        kept_bytes: int | None = None,
    ) -> None:
        self.name, self.role, self.model, self.tokenizer = name, role, model, tokenizer
        self.samples, self.question, self.protocol = list(samples), question, f"question-{question}"
        self.prompts = [torch.tensor([self._prompt(sample)]) for sample in self.samples]
        self.context, self.count = self.prompts[0].shape[1], len(self.samples)
        self.spec = ModelSpec.from_config(model.config)
        own = {"task": name, "question": question, "n": self.count}
        self.records = Records(records, self.settings | (settings or {}), own | (facts or {}))
        self.batch_size, self.progress, self.kept_bytes = batch_size, progress or Progress(), kept_bytes
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

    @property
    def steps(self) -> int:
        return self.count

    def measure(self, method: Method, tables: Tables) -> Measured:
        own = [tables(prompt.shape[1]) for prompt in self.prompts]
        losses, weights = [], []
        for index, batch in enumerate(self._batches(1 if method.quantized else self.batch_size)):
            records = [self.records.find(method, own[row], row) for row in batch]
            if None in records:
                records = self._answered(index, batch, method, tables)
            for row, record in zip(batch, records, strict=True):
                assert record is not None
                losses.append(1 - sum(record["scores"]) / len(record["scores"]))
                weights.append([record["bytes"], record["dense_bytes"], record["entries"]])
                if row < self.count - 1:
                    self.progress.advance()
        mean = torch.tensor(weights, dtype=torch.float64).mean(0).round().long().tolist()
        return Measured(torch.tensor(losses, dtype=torch.float64), CacheBytes(*mean))

    def decode_ms(self, method: Method, table: Tensor) -> float:
        from kvpolicy.comparison.real_cache import decode_ms

        return decode_ms(self.model, method, table, self.prompts[0], self.tokenizer)

    def _prompt(self, sample: Sample) -> tuple[int, ...]:
        """What is compressed."""
        return sample.context if self.question == "agnostic" else (*sample.context, *sample.questions[0])

    def _batches(self, size: int) -> list[range]:
        """The numbers of the samples that are run together."""
        return [range(first, min(first + size, self.count)) for first in range(0, self.count, size)]

    def _answered(self, index: int, batch: range, method: Method, tables: Tables) -> list[dict[str, Any] | None]:
        """The records of a batch."""
        samples = [self.samples[row] for row in batch]
        lengths = [self.prompts[row].shape[1] for row in batch]
        own, begun = [tables(length) for length in lengths], time.monotonic()
        with ready(self.model, method):
            cache, logits = self._compressed(index, method, tables if len(set(lengths)) > 1 else own[0])
            limits = [table.clamp(max=length) for table, length in zip(own, lengths, strict=True)]
            memory = weighed_rows(cache, limits, self.spec, self.dtype)
            answers = self._answers(cache, logits, samples, lengths)
        seconds = round((time.monotonic() - begun) / len(batch), 3)
        records: list[dict[str, Any] | None] = []
        for row, sample, table, said, weight in zip(batch, samples, own, answers, memory, strict=True):
            pairs = zip(said, sample.turns, strict=True)
            scores = [plugin_call.answer_score(self.role, answer, turn) for answer, turn in pairs]
            values = {"answers": said, "scores": scores, "about": dict(sample.about), "tokens": sample.length}
            values["seconds"] = seconds
            values |= {"bytes": weight.bytes, "dense_bytes": weight.dense_bytes, "entries": weight.entries}
            records.append(self.records.find(method, table, row) or self.records.add(method, table, row, values))
        return records

    def _compressed(self, index: int, method: Method, table: Tensor | Tables) -> tuple[Any, Tensor]:
        """The cache of a batch of prompts, and the logits behind each. One run of them serves every table of a policy.

        table: for each length where prompts differ in it
        """
        if method.quantized:
            assert isinstance(table, Tensor)  # one prompt at a time: a batch might share its scales
            return filled_cache(self.model, method, table, self.prompts[index])
        if self._ready is None or differs(self._ready, method):
            self._ready = None  # frees its caches first
            self._ready = self._prompts(method)
        return self._ready.compressed(index, table, method.runtime_allocator)

    def _prompts(self, method: Method) -> Prompts:
        batches, padding = [], []
        for batch in self._batches(self.batch_size):
            own = [self.prompts[row][0] for row in batch]
            batches.append(torch.nn.utils.rnn.pad_sequence(own, batch_first=True, padding_side="left"))
            padding.append(torch.tensor([batches[-1].shape[1] - len(ids) for ids in own]))
        options = self.kept_bytes, method.entry_format, method.shared_layers
        return Prompts(self.model, batches, method.policy, self.tokenizer, padding, *options)

    def _answers(self, cache: Any, logits: Tensor, samples: list[Sample], lengths: list[int]) -> list[list[str]]:
        """One for each turn of each sample; each stays in the conversation."""
        talk = Talk(self.model, cache, logits, lengths, self._ends())
        answers, turns = [list[str]() for _ in samples], max(len(sample.questions) for sample in samples)
        # a question would have the cache compressed again; single tokens do not, and a GPU replays them from a graph
        if isinstance(cache, RaggedCache) and (self.question == "agnostic" or turns > 1):
            cache.hold(talk.room(samples, self.role.max_new_tokens))
        for turn in range(turns):
            asked = [sample.questions[turn] if turn < len(sample.questions) else () for sample in samples]
            if turn or self.question == "agnostic":
                talk.ask(asked)
            last = [turn + 1 >= len(sample.questions) for sample in samples]
            said = talk.answer([bool(question) for question in asked], last, self.role.max_new_tokens)
            for row, tokens in enumerate(said):
                if asked[row]:
                    answers[row].append(self.tokenizer.decode(tokens, skip_special_tokens=True))
        return answers

    def _ends(self) -> set[int]:
        ends = self.model.generation_config.eos_token_id
        return set(ends) if isinstance(ends, list) else {ends}
