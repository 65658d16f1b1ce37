"""Whether a model that finds a number in its prompt with the full cache still finds it under a plan."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from typing import Any

import optuna
import torch
from torch import Tensor

from kvpolicy.compare.methods import Method
from kvpolicy.compare.tasks import RetrievalTask
from kvpolicy.errors import TextError
from kvpolicy.interfaces import EvictionPolicy
from kvpolicy.retrieval import Question, make_passkeys
from kvpolicy.text import Corpus
from kvpolicy.tuning.probes import needle_seed
from kvpolicy.tuning.settings import TuneSettings
from kvpolicy.tuning.storage import settings_digest

PROMPTS = 20
ABLE = 0.8
"""A model that finds fewer of the numbers than this with the full cache cannot do the task."""


class PasskeyCheck:
    """Held-out pass keys under the plan's policy. Each table is measured once and its score kept in the study.

    questions: prompts of equal length
    """

    def __init__(
        self,
        model: Any,
        corpus: Corpus,
        questions: Sequence[Question],
        settings: TuneSettings,
        policy: EvictionPolicy,
        study: optuna.Study,
    ) -> None:
        self._task = RetrievalTask("passkey", model, corpus.tokenizer, questions, batch_size=settings.batch_size)
        self._method = Method("plan", settings.policy, policy)
        self._study = study
        self.count, self.length = self._task.count, self._task.context

    def score(self, table: Tensor) -> float:
        """The part of the prompts whose number is generated exactly. table: int64 `[L, H]`, of `length` tokens."""
        digest = hashlib.sha256(json.dumps(table.tolist()).encode()).hexdigest()[:16]
        key = f"kvpolicy_passkey:{settings_digest(self._study)}:{digest}"
        known = self._study.user_attrs.get(key)
        if known is None:
            known = 1 - float(self._task.measure(self._method, table).losses.mean())
            self._study.set_user_attr(key, known)
        return float(known)

    def full_score(self) -> float:
        """With nothing evicted."""
        return self.score(torch.full(self._task.spec.table_shape, self.length))


def passkey_questions(corpus: Corpus, settings: TuneSettings, without: Collection[str]) -> list[Question]:
    """Prompts of the context's length that ask for none of the numbers in `without`, those of the search.

    Raises `TextError` where there is no tokenizer and where the context is too short.
    """
    if corpus.tokenizer is None:
        raise TextError(f"the text {corpus.name} came without its tokenizer")
    seed = needle_seed(settings, 2)
    return make_passkeys(
        corpus.tokenizer, PROMPTS, settings.context_length, seed, lambda question: question.answer not in without
    )
