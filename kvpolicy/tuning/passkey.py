"""Whether a model that finds a number in its prompt with the full cache still finds it under a plan."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kvpolicy.budget.entry_format import Format
from kvpolicy.integrations.transformers import Prompts
from kvpolicy.plugins.roles import EvictionPolicy
from kvpolicy.tasks.needles import answer_of
from kvpolicy.tasks.questions import Question, recalled
from kvpolicy.tuning.study_notes import StudyNotes

ABLE = 0.8
"""A model that finds fewer of the numbers than this with the full cache cannot do the task."""


class PasskeyCheck:
    """Held-out pass keys under the plan's policy. Each prompt is run once for all tables; the study keeps the scores.

    A number is found where greedy decoding says it. One forward of the answer checks that: each of its tokens has
    to be the likeliest one behind those before it, and what follows may be no digit.

    questions: prompts of equal length, whose answers have equally many tokens
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        questions: Sequence[Question],
        policy: EvictionPolicy,
        notes: StudyNotes,
        batch_size: int = 1,
    ) -> None:
        self._model, self._tokenizer, self._policy, self._notes = model, tokenizer, policy, notes
        self._questions = list(questions)
        self.count, self.length = len(questions), len(questions[0].ids)
        self._answers = torch.stack([answer_of(tokenizer, question) for question in questions])
        self._batch = batch_size

    def scores(self, tables: Sequence[Tensor], formats: Sequence[Format] | None = None) -> tuple[float, list[float]]:
        """The parts of the prompts whose number is generated exactly: with the full cache, and under each table.

        tables:  int64 `[L, H]` each, the entries of `length` tokens that are kept
        formats: of the entries under each of them; None for the model's dtype

        A model that finds fewer than `ABLE` with the full cache has no scores under tables.
        """
        whole = torch.full(tables[0].shape, max(self.length, self._policy.least_capacity))
        pairs = list(zip(tables, formats or [None] * len(tables), strict=True))
        full = self._notes.passkey_score(whole)
        scores = [score for pair in pairs if (score := self._notes.passkey_score(*pair)) is not None]
        if full is None or (full >= ABLE and len(scores) < len(tables)):
            full, *scores = self._measured(whole, pairs)
            for (table, own), score in zip(((whole, None), *pairs), (full, *scores), strict=False):
                self._notes.keep_passkey_score(table, score, own)
        return full, scores if full >= ABLE else []

    def _measured(self, whole: Tensor, pairs: Sequence[tuple[Tensor, Format]]) -> list[float]:
        """The full cache's score, and those under the tables as long as the task may still be one for this model."""
        counts = [0] * (1 + len(pairs))
        for first in range(0, self.count, self._batch):
            batch = slice(first, first + self._batch)
            ids = torch.stack([question.ids for question in self._questions[batch]])

            @cache  # a run of the prompts serves all tables under a format
            def prompts(own: Format, ids: Tensor = ids) -> Prompts:
                return Prompts(self._model, [ids], self._policy, self._tokenizer, entry_format=own)

            counts[0] += self._count(prompts(None), whole, batch)
            # More are lost than a model that can do the task may lose: the tables' answers would not be used.
            if first + len(ids) - counts[0] > self.count - ABLE * self.count:
                continue
            for index, (table, own) in enumerate(pairs, 1):
                counts[index] += self._count(prompts(own), table, batch)
        return [count / self.count for count in counts[: None if counts[0] >= ABLE * self.count else 1]]

    def _count(self, prompts: Prompts, table: Tensor, batch: slice) -> int:
        """How many numbers greedy decoding gives behind a batch of prompts."""
        answers = self._answers[batch]
        decoded = prompts.logits(0, table, answers.to(self._model.device)).argmax(-1).cpu()
        texts = self._tokenizer.batch_decode(decoded, skip_special_tokens=True)
        same = (decoded[:, :-1] == answers).all(1).tolist()
        pairs = zip(same, texts, self._questions[batch], strict=True)
        return sum(is_same and recalled(text) == question.answer for is_same, text, question in pairs)
