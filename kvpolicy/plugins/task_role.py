"""The fourth role: prompts whose answers are known, and how right an answer is.

A task makes prompts and judges answers. It knows nothing of models, caches and budgets.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Self

from kvpolicy.model.chat_frame import ChatFrame, token_ids


@dataclass(frozen=True, slots=True)
class Turn:
    """One question about a context.

    question: its text, as it stands behind the context, or behind the answer before it
    answers:  the right ones; whether one or all of them count says the task
    prefix:   how the answer begins: it is given to the model, which goes on behind it
    classes:  the answers that there are, for a task that has a list of them
    """

    question: str
    answers: tuple[str, ...]
    prefix: str = ""
    classes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Sample:
    """A context and the questions about it, as tokens and as text.

    context:   tokens that come first, and that a question-agnostic run compresses alone
    questions: the tokens of each turn, behind the context and behind the answer before, up to where the model answers
    turns:     one for each of `questions`
    about:     what a reader may want to know of it, such as the depth of a needle; JSON values
    """

    context: tuple[int, ...]
    questions: tuple[tuple[int, ...], ...]
    turns: tuple[Turn, ...]
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Tokens of the context and the first question."""
        return len(self.context) + len(self.questions[0])

    @classmethod
    def from_text(
        cls,
        tokenizer: Any,
        context: str,
        turns: Sequence[Turn],
        *,
        chat: bool = True,
        about: Mapping[str, Any] | None = None,
    ) -> Self:
        """A sample whose context is a text. chat: in the tokenizer's chat template, where it has one.

        Raises `ModelError` for a tokenizer that cannot read it.
        """
        frame = ChatFrame.of(tokenizer, chat=chat)
        ids = (*frame.before, *token_ids(tokenizer, context))
        return cls(ids, question_ids(tokenizer, frame, turns), tuple(turns), about or {})


def question_ids(tokenizer: Any, frame: ChatFrame, turns: Sequence[Turn]) -> tuple[tuple[int, ...], ...]:
    """The tokens of each turn in a frame: what leads to it, its question, and the beginning of its answer."""
    questions = []
    for index, turn in enumerate(turns):
        question, begun = token_ids(tokenizer, turn.question), token_ids(tokenizer, turn.prefix)
        questions.append((*(frame.between if index else ()), *question, *frame.after, *begun))
    return tuple(questions)


class Task(abc.ABC):
    """Prompts whose answers are known. Subclasses are frozen dataclasses of JSON-able fields with defaults.

    names:  what a family of tasks has, such as "vt" of `ruler/vt`; the class then has a field `name`
    metric: what `score` is called, for tables

    Laws, checked by `kvpolicy.testing.check_task`: the same samples for the same arguments, as many as were asked for
    or as many as there are; none longer than `length`; each with a question and an answer for every turn; scores from
    0 to 1, and 1 for a right answer.
    """

    names: ClassVar[tuple[str, ...]] = ()
    metric: str

    def params(self) -> dict[str, Any]:
        """The fields, as JSON values."""
        return asdict(self)  # type: ignore[call-overload, no-any-return]  # the registry admits dataclasses only

    @property
    @abc.abstractmethod
    def max_new_tokens(self) -> int:
        """Tokens of an answer at most."""

    @abc.abstractmethod
    def samples(self, tokenizer: Any, count: int, length: int, seed: int) -> Sequence[Sample]:
        """`count` samples, fewer where there are no more.

        tokenizer: the model's, of transformers
        length:    tokens of the context and the first question: exactly as many where the task makes its contexts, at
                   most where it reads them
        seed:      the same one gives the same samples

        Raises `TextError` for a length without room, and for a file that is missing or cannot be read.
        """

    @abc.abstractmethod
    def score(self, answer: str, turn: Turn) -> float:
        """How right an answer is, from 0 to 1."""
