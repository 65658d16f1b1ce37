"""The answer behind a task's prompt, as tokens whose loss says how well a compressed context still gives it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvpolicy.errors import TextError
from kvpolicy.model.chat_frame import token_ids
from kvpolicy.plugins import plugin_call
from kvpolicy.plugins.task_role import Sample, Task, Turn
from kvpolicy.tasks.question_time import QuestionTime

_LEAST = 8  # samples of which some are searched on and some held out


@dataclass(frozen=True, slots=True)
class KnownAnswer:
    """The first turn of a sample.

    prompt:   tokens that are compressed
    question: tokens that are read behind it, none where the question is part of the prompt
    answer:   tokens that are scored
    """

    prompt: tuple[int, ...]
    question: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.prompt), len(self.question), len(self.answer)

    @property
    def ids(self) -> tuple[int, ...]:
        return (*self.prompt, *self.question, *self.answer)


def known_answer(task: Task, tokenizer: Any, sample: Sample, question: QuestionTime) -> KnownAnswer:
    """A sample's first question with a right answer, of at most `max_new_tokens`. Raises `TextError` for one without
    tokens.
    """
    text = _right_answer(task, sample.turns[0])
    answer = token_ids(tokenizer, f" {text}" if _goes_on(tokenizer, sample) else text)[: task.max_new_tokens]
    if not answer:
        raise TextError(f"a sample has an answer without tokens, {text!r}, and its loss cannot be measured")
    if question == "aware":
        return KnownAnswer((*sample.context, *sample.questions[0]), (), tuple(answer))
    return KnownAnswer(sample.context, sample.questions[0], tuple(answer))


def split_samples(samples: Sequence[Sample], search: int, heldout: int, seed: int) -> tuple[list[Sample], list[Sample]]:
    """At most so many samples to search on, and others to report on, in an order drawn once. Samples of one context are
    all on one side; where there are few, half of them are held out.

    Raises `TextError` where there are too few, or too few contexts.
    """
    order = list(samples)
    random.Random(seed).shuffle(order)
    goal = min(search, len(order) // 2)
    first = set[tuple[int, ...]]()
    for sample in order:
        if sum(other.context in first for other in order) >= goal:
            break
        first.add(sample.context)
    mine = [sample for sample in order if sample.context in first][:search]
    others = [sample for sample in order if sample.context not in first][:heldout]
    if len(order) < _LEAST or len(others) < _LEAST // 2:
        raise TextError(
            f"the task has {len(order)} samples here, {len(others)} of them about contexts that are not searched on: "
            f"a search takes {_LEAST} at least, half of them to report on"
        )
    return mine, others


def _right_answer(task: Task, turn: Turn) -> str:
    """The first right answer, or all of them where the score asks for all."""
    together = ", ".join(turn.answers)
    scores = {text: plugin_call.answer_score(task, text, turn) for text in (turn.answers[0], together)}
    return max(scores, key=lambda text: scores[text])


def _goes_on(tokenizer: Any, sample: Sample) -> bool:
    """Whether an answer follows words of the prompt, so that a space stands between; none follows a chat template."""
    turn = sample.turns[0]
    text = turn.prefix or turn.question
    own = tuple(token_ids(tokenizer, text))
    return not text[-1:].isspace() and bool(own) and sample.questions[0][-len(own) :] == own
