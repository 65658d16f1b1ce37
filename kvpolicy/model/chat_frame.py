"""What stands around the words of a prompt: the tokens of a chat template, or the beginning of a text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvpolicy.errors import ModelError, foreign

_MARKS = ("(first words)", "(an answer)", "(more words)")  # no template treats them as its own


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a piece of text, none of them added around it. Raises `ModelError`."""
    with foreign(f"the tokenizer of {tokenizer.name_or_path} cannot read {text[:40]!r}", ModelError):
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return ids


def start_ids(tokenizer: Any) -> list[int]:
    """The beginning-of-sequence token of a tokenizer that puts it before every text."""
    start = list(tokenizer("").input_ids)
    return start if start == [tokenizer.bos_token_id] else []


@dataclass(frozen=True, slots=True)
class ChatFrame:
    """Tokens around what a user says, so that its parts can be tokenized, counted and fed one after another.

    before:  at the beginning of the first turn
    after:   behind the user's words, up to where the model answers
    between: behind an answer, up to the user's next words
    """

    before: tuple[int, ...]
    after: tuple[int, ...] = ()
    between: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: Any, *, chat: bool) -> ChatFrame:
        """The frame of a tokenizer's chat template, where it has one and `chat` asks for it, else of plain text.

        Raises `ModelError` for a template that fails or leaves words out.
        """
        if not chat or not getattr(tokenizer, "chat_template", None):
            return cls(tuple(start_ids(tokenizer)))
        whose = f"the chat template of {tokenizer.name_or_path or 'the tokenizer'}"
        roles = ("user", "assistant", "user")
        talk = [{"role": role, "content": mark} for role, mark in zip(roles, _MARKS, strict=True)]
        with foreign(f"{whose} fails", ModelError):
            text: str = tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
        parts = []
        for mark in _MARKS:
            part, separator, text = text.partition(mark)
            if not separator:
                raise ModelError(f"{whose} leaves out {mark!r} of a talk of two turns")
            parts.append(tuple(token_ids(tokenizer, part)))
        return cls(*parts)
