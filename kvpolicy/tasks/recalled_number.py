"""The pass key and the key-value item as tasks: the prompts of `questions`, a number that is recalled or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvpolicy.model.chat_frame import token_ids
from kvpolicy.plugins.task_role import Sample, Task, Turn
from kvpolicy.tasks.questions import Question, make_key_values, make_passkeys, recalled


class _NumberTask(Task):
    """A number of five digits is said at the end of plain text, or it is not."""

    @property
    def metric(self) -> str:  # type: ignore[override]
        return "recalled"

    @property
    def max_new_tokens(self) -> int:
        return 16

    def score(self, answer: str, turn: Turn) -> float:
        return float(recalled(answer) == turn.answers[0])


@dataclass(frozen=True, slots=True)
class PasskeyTask(_NumberTask):
    """One number in repeated filler, at depths drawn evenly."""

    def samples(self, tokenizer: Any, count: int, length: int, seed: int) -> Sequence[Sample]:
        return [_sample(tokenizer, question) for question in make_passkeys(tokenizer, count, length, seed)]


@dataclass(frozen=True, slots=True)
class KeyValueTask(_NumberTask):
    """As many items with a number each as there is room for, and one that is asked for."""

    def samples(self, tokenizer: Any, count: int, length: int, seed: int) -> Sequence[Sample]:
        return [_sample(tokenizer, question) for question in make_key_values(tokenizer, count, length, seed)]


def _sample(tokenizer: Any, question: Question) -> Sample:
    """The same tokens, the question behind the context."""
    ids, end = question.ids.tolist(), token_ids(tokenizer, question.ending)
    turn = Turn(question.ending, (question.answer,))
    return Sample(tuple(ids[: -len(end)]), (tuple(end),), (turn,), {"depth": question.depth})
