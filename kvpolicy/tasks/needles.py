"""Needle prompts with the answer behind them, whose tokens' loss says whether a cache has kept a fact."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvpolicy.tasks.questions import Fits, Question, answer_ids, make_key_values, make_passkeys

_SAMPLED = 64  # numbers looked at to find how many tokens most of them have


@dataclass(frozen=True, slots=True, eq=False)
class Needles:
    """Prompts that were made, each with its answer.

    sequences: int64 `[count, length + n]`, prompt and answer;  answers: the numbers asked for
    """

    sequences: Tensor
    answers: frozenset[str]


def make_needles(tokenizer: Any, count: int, length: int, seed: int, without: Collection[str] = ()) -> Needles:
    """Prompts of exactly `length` tokens, pass keys and key-value items by turns, each at depths drawn evenly, with the
    tokens of the answer behind each: equally many everywhere.

    count:   an even number of prompts
    without: numbers that none of the answers is

    Raises `TextError` for a length that is too short, and for a tokenizer for whose numbers there is no such count.
    """
    fits = equal_answers(tokenizer, seed, without)
    keys = make_passkeys(tokenizer, count // 2, length, seed, fits)
    items = make_key_values(tokenizer, count // 2, length, seed, fits)
    questions = [question for pair in zip(keys, items, strict=True) for question in pair]
    rows = [torch.cat([question.ids, answer_of(tokenizer, question)]) for question in questions]
    return Needles(torch.stack(rows), frozenset(question.answer for question in questions))


def answer_of(tokenizer: Any, question: Question) -> Tensor:
    """The tokens of the answer behind its prompt, int64 `[n]`."""
    return torch.tensor(answer_ids(tokenizer, question.ending, question.answer))


def equal_answers(tokenizer: Any, seed: int, without: Collection[str] = ()) -> Fits:
    """Which prompts can stand in one set: answers of as many tokens as most numbers have, and none of `without`."""
    tokens = _usual_tokens(tokenizer, seed)
    return lambda question: question.answer not in without and len(answer_of(tokenizer, question)) == tokens


def _usual_tokens(tokenizer: Any, seed: int) -> int:
    """How many tokens most numbers have."""
    draw = random.Random(seed)
    numbers = [str(draw.randrange(10_000, 100_000)) for _ in range(_SAMPLED)]
    return Counter(len(answer_ids(tokenizer, "The key is", number)) for number in numbers).most_common(1)[0][0]
