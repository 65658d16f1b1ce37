"""Retrieval tasks, made offline: a number that stands somewhere in a prompt, and the question for it at the end.

Sources: a pass key in repeated filler is Landmark Attention's, Mohtashami and Jaggi, arXiv:2305.16300; one value among
many of its kind is the key-value retrieval of Lost in the Middle, Liu et al., arXiv:2307.03172. The wording is our own.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvpolicy.errors import TextError
from kvpolicy.model.chat_frame import start_ids, token_ids

FILLER = (
    " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    " The road is long. The river is wide."
)
_SPARE_TOKENS = 3  # for a space or a colon before the number
_DRAWS = 200  # of one prompt, until it is one that is wanted


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """One prompt.

    ids:    int64 [T]
    answer: the number that is asked for
    depth:  where it stands, 0 first and 1 last
    answer_tokens: to generate, enough for the number
    ending: the text at the end of the prompt, which a space and the number follow
    """

    ids: Tensor
    answer: str
    depth: float
    answer_tokens: int
    ending: str = ""


Fits = Callable[[Question], bool]


def make_passkeys(tokenizer: Any, count: int, length: int, seed: int = 0, fits: Fits | None = None) -> list[Question]:
    """`count` prompts of exactly `length` tokens: one number of five digits in filler, at depths drawn evenly.

    fits: which prompts are wanted; others are drawn again

    Raises `TextError` where `length` leaves no filler, and where no prompt fits.
    """
    ending = " What is the pass key? The pass key is"

    def make(draw: random.Random, depth: float) -> Question:
        key = _number(draw)
        begin = start_ids(tokenizer) + token_ids(
            tokenizer, "Somewhere in this text stands a pass key. Find it and remember it."
        )
        needle = token_ids(tokenizer, f" The pass key is {key}. Remember it.")
        end, filler = token_ids(tokenizer, ending), token_ids(tokenizer, FILLER)
        room = _room(length, len(begin) + len(needle) + len(end), least=len(filler))
        around = (filler * (room // len(filler) + 1))[:room]
        at = round(depth * room / len(filler)) * len(filler)  # between two rounds of the filler
        return _question(tokenizer, begin + around[:at] + needle + around[at:] + end, key, depth, ending)

    return _spread(make, count, seed, fits)


def make_key_values(tokenizer: Any, count: int, length: int, seed: int = 0, fits: Fits | None = None) -> list[Question]:
    """`count` prompts of exactly `length` tokens: as many items with a number each as there is room for, and one asked
    for, at depths drawn evenly.

    fits: which prompts are wanted; others are drawn again

    Raises `TextError` where `length` leaves room for fewer than two items, and where no prompt fits.
    """

    def make(draw: random.Random, depth: float) -> Question:
        begin = start_ids(tokenizer) + token_ids(
            tokenizer, "Each item of this list has a number. Remember all of them."
        )
        names = draw.sample(range(1_000, 10_000), 9_000)
        ending = f" Which number has item {names[0]}? Item {names[0]} has number"
        end = token_ids(tokenizer, ending)
        room = _room(length, len(begin) + len(end), least=2 * len(_item(tokenizer, names[0], "10000")))
        items: list[tuple[int, str, list[int]]] = []
        for name in names:
            number = _number(draw)
            line = _item(tokenizer, name, number)
            if room < len(line):
                break
            items.append((name, number, line))
            room -= len(line)
        place = min(int(depth * len(items)), len(items) - 1)
        items.insert(place, items.pop(0))  # the first one drawn is asked for
        around = (token_ids(tokenizer, FILLER) * length)[:room]
        body = [token for _, _, line in items for token in line]
        return _question(tokenizer, begin + around + body + end, items[place][1], depth, ending)

    return _spread(make, count, seed, fits)


def answer_ids(tokenizer: Any, ending: str, answer: str) -> list[int]:
    """The tokens of a number as they follow the end of its prompt, a space included.

    Raises `TextError` for a tokenizer that makes one token of the prompt's end and the number.
    """
    before, whole = token_ids(tokenizer, ending), token_ids(tokenizer, f"{ending} {answer}")
    if whole[: len(before)] != before or len(whole) == len(before):
        raise TextError(
            f"this tokenizer joins the number {answer} to the end of its prompt, so that its tokens cannot be told "
            "apart: needle prompts cannot be made for it"
        )
    return whole[len(before) :]


def recalled(text: str) -> str:
    """The first number in an answer, '' if there is none."""
    number = re.search(r"\d+", text)
    return number[0] if number else ""


def _spread(
    make: Callable[[random.Random, float], Question], count: int, seed: int, fits: Fits | None
) -> list[Question]:
    """Depths are one from each of `count` equal parts, in no order, so that few prompts cover all of them."""
    draw = random.Random(seed)
    depths = [(index + draw.random()) / count for index in range(count)]
    draw.shuffle(depths)
    return [_fitting(partial(make, draw, depth), fits) for depth in depths]


def _fitting(make: Callable[[], Question], fits: Fits | None) -> Question:
    for _ in range(_DRAWS):
        question = make()
        if fits is None or fits(question):
            return question
    raise TextError(
        f"none of {_DRAWS} prompts that were drawn has an answer that fits (the last one's is {question.answer}): this "
        "tokenizer gives the numbers of 5 digits no usual count of tokens"
    )


def _question(tokenizer: Any, ids: list[int], answer: str, depth: float, ending: str) -> Question:
    return Question(torch.tensor(ids), answer, depth, len(token_ids(tokenizer, f" {answer}")) + _SPARE_TOKENS, ending)


def _number(draw: random.Random) -> str:
    return str(draw.randrange(10_000, 100_000))


def _item(tokenizer: Any, name: int, number: str) -> list[int]:
    return token_ids(tokenizer, f" Item {name} has number {number}.")


def _room(length: int, taken: int, least: int) -> int:
    if length - taken < least:
        raise TextError(f"a prompt of {length} tokens is too short for this task: give at least {taken + least}")
    return length - taken
