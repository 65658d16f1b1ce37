"""Samples of an exact number of tokens, under any tokenizer."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from kvpolicy.errors import TextError
from kvpolicy.model.chat_frame import ChatFrame, token_ids
from kvpolicy.plugins.task_role import Sample, Turn, question_ids
from kvpolicy.tasks.questions import FILLER


@dataclass(frozen=True, slots=True)
class Fitting:
    """What is known of a sample before its body: how it begins, what is asked, and how long all of it is.

    begin:     tokens before the body
    questions: see `Sample`
    length:    tokens of the context and the first question
    """

    tokenizer: Any
    begin: tuple[int, ...]
    questions: tuple[tuple[int, ...], ...]
    turns: tuple[Turn, ...]
    length: int

    @classmethod
    def of(cls, tokenizer: Any, head: str, turns: Sequence[Turn], length: int, *, chat: bool = True) -> Self:
        """head: the text before the body;  chat: in the tokenizer's chat template, where it has one"""
        frame = ChatFrame.of(tokenizer, chat=chat)
        begin = (*frame.before, *token_ids(tokenizer, head))
        return cls(tokenizer, begin, question_ids(tokenizer, frame, turns), tuple(turns), length)

    def ids(self, text: str) -> list[int]:
        return token_ids(self.tokenizer, text)

    def room(self, least: int = 0) -> int:
        """Tokens for the body. Raises `TextError` where there are fewer than `least`."""
        around = len(self.begin) + len(self.questions[0])
        if self.length - around < least:
            raise TextError(
                f"a prompt of {self.length} tokens is too short for this task: give at least {around + least}"
            )
        return self.length - around

    def sample(self, body: Sequence[int], about: Mapping[str, Any] | None = None) -> Sample:
        """The sample around a body. What is missing to the length is filler between the beginning and the body."""
        missing = self.room(len(body)) - len(body)
        noise = self.ids(FILLER)
        filler = (noise * (missing // len(noise) + 1))[:missing]
        return Sample((*self.begin, *filler, *body), self.questions, self.turns, about or {})


def drawer(seed: int, index: int) -> random.Random:
    """The chance of one sample, which depends on no other sample."""
    return random.Random(f"{seed}:{index}")


def taken(pieces: Sequence[Sequence[int]]) -> int:
    """Tokens of all pieces."""
    return sum(map(len, pieces))


def joined(pieces: Sequence[Sequence[int]]) -> list[int]:
    return [token for piece in pieces for token in piece]
