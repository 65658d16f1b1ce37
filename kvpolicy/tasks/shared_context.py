"""Several questions in turn about one context, made here.

Source: SCBench, Li et al., arXiv:2412.10319: retrieval of values by key, and of strings by their beginning and end. The
rules are its own; the wording is ours.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from typing import Any

from kvpolicy.plugins.task_role import Sample, Turn
from kvpolicy.tasks.fitting import Fitting, joined
from kvpolicy.tasks.needle_lines import drawn_value

_PART = 6  # characters of a beginning and of an end
_MIDDLE = 12
_POOL = 12  # beginnings and ends that strings share, for each question
Pair = tuple[str, str]


def key_values_sample(tokenizer: Any, length: int, draw: random.Random, *, turns: int) -> Sample:
    """A JSON object of UUIDs, as many as there is room for; the values of `turns` keys are asked for in turn.

    Exactly `length` tokens. Raises `TextError` for a length without room.
    """

    def pair() -> Pair:
        return drawn_value("uuids", draw), drawn_value("uuids", draw)

    targets = [pair() for _ in range(turns)]
    questions = [Turn(f'\nWhich value has the key "{key}"?', (value,), " The value is") for key, value in targets]
    head = "The JSON object below has a value for each key. Remember them.\n{"
    fitting = Fitting.of(tokenizer, head, questions, length)
    return _filled(fitting, targets, pair, lambda key, value: f'"{key}": "{value}",\n', "}", draw)


def prefix_suffix_sample(tokenizer: Any, length: int, draw: random.Random, *, turns: int) -> Sample:
    """Strings that share their beginnings with some others and their ends with some others; the one that has both is
    asked for. Exactly `length` tokens. Raises `TextError` for a length without room.
    """
    begins, ends = ([_characters(_PART, draw) for _ in range(_POOL * turns)] for _ in range(2))
    known: set[Pair] = set()

    def pair() -> Pair:
        while (drawn := (draw.choice(begins), draw.choice(ends))) in known and len(known) < len(begins) * len(ends):
            pass
        known.add(drawn)
        return drawn

    targets = [pair() for _ in range(turns)]
    whole = {drawn: _characters(_MIDDLE, draw).join(drawn) for drawn in targets}
    questions = [
        Turn(f'\nWhich string begins with "{first}" and ends with "{last}"?', (whole[first, last],), " The string is")
        for first, last in targets
    ]
    fitting = Fitting.of(tokenizer, "Remember all of the strings below.\n", questions, length)

    def line(first: str, last: str) -> str:
        return f"{whole.get((first, last)) or _characters(_MIDDLE, draw).join((first, last))}\n"

    return _filled(fitting, targets, pair, line, "", draw)


def _filled(
    fitting: Fitting,
    targets: list[Pair],
    pair: Callable[[], Pair],
    line: Callable[[str, str], str],
    end: str,
    draw: random.Random,
) -> Sample:
    """The lines of what is asked for, in any place among as many others as there is room for."""
    lines, closing = [fitting.ids(line(*pair)) for pair in targets], fitting.ids(end)
    room = fitting.room(len(joined(lines)) + len(closing)) - len(joined(lines)) - len(closing)
    while len(other := fitting.ids(line(*pair()))) <= room:
        lines.append(other)
        room -= len(other)
    draw.shuffle(lines)
    return fitting.sample([*joined(lines), *closing])


def _characters(count: int, draw: random.Random) -> str:
    return "".join(draw.choices(string.ascii_lowercase + string.digits, k=count))
