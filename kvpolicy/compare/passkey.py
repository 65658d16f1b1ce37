"""Passkey retrieval, made offline: a number in a long stretch of filler, and the question for it at the end.

Source: Landmark Attention, Mohtashami and Jaggi, arXiv:2305.16300, section 4.2; the wording here is our own.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvpolicy.errors import TextError

INTRODUCTION = "Somewhere in this text stands a pass key. Find it and remember it."
FILLER = (
    " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    " The road is long. The river is wide."
)
NEEDLE = " The pass key is {key}. Remember it."
QUESTION = " What is the pass key? The pass key is"
_SPARE_TOKENS = 3  # for a space or a colon before the number


@dataclass(frozen=True, slots=True, eq=False)
class Passkey:
    """One prompt.

    ids:   int64 [T]
    key:   the number
    depth: where it stands, 0 first and 1 last of the filler
    answer_tokens: to generate, enough for the number
    """

    ids: Tensor
    key: str
    depth: float
    answer_tokens: int


def make_passkeys(tokenizer: Any, count: int, length: int, seed: int = 0) -> list[Passkey]:
    """`count` prompts of exactly `length` tokens: numbers of five digits at depths drawn evenly.

    Depths are one from each of `count` equal parts of the filler, so that few prompts cover it too. Raises `TextError`
    where `length` leaves no filler.
    """
    draw = random.Random(seed)
    keys = [str(draw.randrange(10_000, 100_000)) for _ in range(count)]
    depths = [(index + draw.random()) / count for index in range(count)]
    draw.shuffle(depths)
    return [_make(tokenizer, key, depth, length) for key, depth in zip(keys, depths, strict=True)]


def recalled(text: str) -> str:
    """The first number in an answer, '' if there is none."""
    found = re.search(r"\d+", text)
    return found[0] if found else ""


def _make(tokenizer: Any, key: str, depth: float, length: int) -> Passkey:
    start = list(tokenizer("").input_ids)
    first = start if start == [tokenizer.bos_token_id] else []
    begin, needle = first + _ids(tokenizer, INTRODUCTION), _ids(tokenizer, NEEDLE.format(key=key))
    end, filler = _ids(tokenizer, QUESTION), _ids(tokenizer, FILLER)
    room = length - len(begin) - len(needle) - len(end)
    if room < len(filler):
        least = length - room + len(filler)
        raise TextError(f"a passkey prompt of {length} tokens has no room for its filler: give at least {least}")
    sentences = (filler * (room // len(filler) + 1))[:room]
    at = round(depth * room / len(filler)) * len(filler)  # between two rounds of the filler
    ids = begin + sentences[:at] + needle + sentences[at:] + end
    return Passkey(torch.tensor(ids), key, depth, len(_ids(tokenizer, f" {key}")) + _SPARE_TOKENS)


def _ids(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return found
