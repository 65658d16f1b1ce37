"""Retrieval tasks, made offline: a number that stands somewhere in a prompt, and the question for it at the end.

Sources: a pass key in repeated filler is Landmark Attention's, Mohtashami and Jaggi, arXiv:2305.16300; one value among
many of its kind is the key-value retrieval of Lost in the Middle, Liu et al., arXiv:2307.03172. The wording is our own.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvpolicy.errors import TextError

FILLER = (
    " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    " The road is long. The river is wide."
)
_SPARE_TOKENS = 3  # for a space or a colon before the number


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """One prompt.

    ids:    int64 [T]
    answer: the number that is asked for
    depth:  where it stands, 0 first and 1 last
    answer_tokens: to generate, enough for the number
    """

    ids: Tensor
    answer: str
    depth: float
    answer_tokens: int


def make_passkeys(tokenizer: Any, count: int, length: int, seed: int = 0) -> list[Question]:
    """`count` prompts of exactly `length` tokens: one number of five digits in filler, at depths drawn evenly.

    Raises `TextError` where `length` leaves no filler.
    """

    def make(draw: random.Random, depth: float) -> Question:
        key = _number(draw)
        begin = _start(tokenizer) + _ids(
            tokenizer, "Somewhere in this text stands a pass key. Find it and remember it."
        )
        needle = _ids(tokenizer, f" The pass key is {key}. Remember it.")
        end, filler = _ids(tokenizer, " What is the pass key? The pass key is"), _ids(tokenizer, FILLER)
        room = _room(length, len(begin) + len(needle) + len(end), least=len(filler))
        around = (filler * (room // len(filler) + 1))[:room]
        at = round(depth * room / len(filler)) * len(filler)  # between two rounds of the filler
        return _question(tokenizer, begin + around[:at] + needle + around[at:] + end, key, depth)

    return _spread(make, count, seed)


def make_key_values(tokenizer: Any, count: int, length: int, seed: int = 0) -> list[Question]:
    """`count` prompts of exactly `length` tokens: as many items with a number each as there is room for, and one asked
    for, at depths drawn evenly.

    Raises `TextError` where `length` leaves room for fewer than two items.
    """

    def make(draw: random.Random, depth: float) -> Question:
        begin = _start(tokenizer) + _ids(tokenizer, "Each item of this list has a number. Remember all of them.")
        names = draw.sample(range(1_000, 10_000), 9_000)
        asked = _ids(tokenizer, f" Which number has item {names[0]}? Item {names[0]} has number")
        room = _room(length, len(begin) + len(asked), least=2 * len(_item(tokenizer, names[0], "10000")))
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
        around = (_ids(tokenizer, FILLER) * length)[:room]
        body = [token for _, _, line in items for token in line]
        return _question(tokenizer, begin + around + body + asked, items[place][1], depth)

    return _spread(make, count, seed)


def recalled(text: str) -> str:
    """The first number in an answer, '' if there is none."""
    found = re.search(r"\d+", text)
    return found[0] if found else ""


def _spread(make: Callable[[random.Random, float], Question], count: int, seed: int) -> list[Question]:
    """Depths are one from each of `count` equal parts, in no order, so that few prompts cover all of them."""
    draw = random.Random(seed)
    depths = [(index + draw.random()) / count for index in range(count)]
    draw.shuffle(depths)
    return [make(draw, depth) for depth in depths]


def _question(tokenizer: Any, ids: list[int], answer: str, depth: float) -> Question:
    return Question(torch.tensor(ids), answer, depth, len(_ids(tokenizer, f" {answer}")) + _SPARE_TOKENS)


def _number(draw: random.Random) -> str:
    return str(draw.randrange(10_000, 100_000))


def _item(tokenizer: Any, name: int, number: str) -> list[int]:
    return _ids(tokenizer, f" Item {name} has number {number}.")


def _room(length: int, taken: int, least: int) -> int:
    if length - taken < least:
        raise TextError(f"a prompt of {length} tokens is too short for this task: give at least {taken + least}")
    return length - taken


def _start(tokenizer: Any) -> list[int]:
    """The beginning-of-sequence token of a tokenizer that puts it before every text."""
    start = list(tokenizer("").input_ids)
    return start if start == [tokenizer.bos_token_id] else []


def _ids(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return found
