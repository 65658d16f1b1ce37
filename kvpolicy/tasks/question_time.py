"""When the question comes: a figure of one kind says nothing of the other, so every row names its kind."""

from __future__ import annotations

from typing import Literal, cast, get_args

from kvpolicy.errors import KVPolicyError

QuestionTime = Literal["aware", "agnostic"]
"""Whether the first question is compressed with its context, or comes behind it, as all later ones do."""


def check_question(question: str) -> QuestionTime:
    """Raises `KVPolicyError` for a word that is neither."""
    if question not in get_args(QuestionTime):
        raise KVPolicyError(f"question= must be aware or agnostic, got '{question}'")
    return cast(QuestionTime, question)
