"""Words that are counted: which stand most often in a long list.

Source: RULER, arXiv:2404.06654, `cwe` and `fwe`. Its frequencies; the words and the wording are our own.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from kvpolicy.plugins.task_role import Sample, Turn
from kvpolicy.tasks.fitting import Fitting
from kvpolicy.tasks.words import different_words, letters

_COMMON = 10
_NUMBERED = 3  # tokens that a numbered word has at least
_LONG = 4096  # tokens from which on the words of `cwe` stand there more often
_VOCABULARY = 50  # tokens of a prompt for each word of `fwe`
_LETTERS = 6
_ALPHA, _ZETA = 2.0, 1.6449340668482264  # how fast frequencies fall, and the zeta function of it: pi^2 / 6
_DOTS = "..."
_COMMON_HEAD = "Below is a numbered list of words, some of which stand there more often than others. Remember those.\n"
_COMMON_TURN = "\nQuestion: Which are the ten most common words of the list above?"
_COMMON_PREFIX = " Answer: The ten most common words of the list are:"


def common_words_sample(tokenizer: Any, length: int, draw: random.Random) -> Sample:
    """Ten words stand in a numbered list ten times as often as the others (six times below 4096 tokens); a worked
    example goes before. Exactly `length` tokens. Raises `TextError` for a length without room.
    """
    often, seldom = (30, 3) if length >= _LONG else (6, 1)
    example = _numbered_example(draw, *((40, 10, 3) if length >= _LONG else (20, 3, 1)))
    names = different_words(_COMMON + max(length // (_NUMBERED * seldom), 1), draw)
    common, others, seed = names[:_COMMON], names[_COMMON:], draw.random()
    turn = Turn(_COMMON_TURN, tuple(common), _COMMON_PREFIX)
    fitting = Fitting.of(tokenizer, f"{example}\n\n{_COMMON_HEAD}", [turn], length)

    def body(count: int) -> list[int]:
        words = common * often + others[:count] * seldom
        random.Random(seed).shuffle(words)
        return fitting.ids("\n" + _numbered(words))

    return fitting.sample(_longest(body, fitting, least=1))


def frequent_words_sample(tokenizer: Any, length: int, draw: random.Random) -> Sample:
    """Made-up words whose frequencies fall with the square of their rank, the first of which are dots. Exactly `length`
    tokens. Raises `TextError` for a length without room.
    """
    words: dict[str, None] = {_DOTS: None}
    while len(words) < max(length // _VOCABULARY, 4):
        words[letters(_LETTERS, draw)] = None
    ranked, seed = list(words), draw.random()
    question = "\nQuestion: Leave out the dots. Which three words stand most often in the text above?"
    turn = Turn(question, tuple(ranked[1:4]), " Answer: The three words that stand there most often are:")
    head = "Below is a text of made-up words. Remember which of them stand there most often.\n"
    fitting = Fitting.of(tokenizer, head, [turn], length)

    def body(count: int) -> list[int]:
        drawn = [word for rank, word in enumerate(ranked, 1) for _ in range(int(count * rank**-_ALPHA / _ZETA))]
        random.Random(seed).shuffle(drawn)
        return fitting.ids("\n" + " ".join(drawn))

    return fitting.sample(_longest(body, fitting, least=53))  # 53 are two of the fourth word and three of the third


def _longest(body: Callable[[int], list[int]], fitting: Fitting, least: int) -> list[int]:
    """The body of the largest count that there is room for, by halving. Raises `TextError` where `least` has none."""
    low, best = least, body(least)
    room = fitting.room(len(best))
    high = least + room  # a word has a token at least
    while low < high:
        middle = (low + high + 1) // 2
        candidate = body(middle)
        if len(candidate) <= room:
            low, best = middle, candidate
        else:
            high = middle - 1
    return best


def _numbered(words: list[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def _numbered_example(draw: random.Random, count: int, often: int, seldom: int) -> str:
    names = different_words(count, draw)
    words = names[:_COMMON] * often + names[_COMMON:] * seldom
    draw.shuffle(words)
    answer = _numbered(names[:_COMMON])
    return f"{_COMMON_HEAD}\n{_numbered(words)}{_COMMON_TURN}{_COMMON_PREFIX} {answer}"
