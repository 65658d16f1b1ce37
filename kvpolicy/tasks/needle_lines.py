"""Needles by RULER's rules: numbers or UUIDs that lines give to keys, among lines of filler or of other keys.

Source: RULER, Hsieh et al., arXiv:2404.06654, `niah_single_1`, `niah_multikey_2` and `niah_multikey_3`. What is hidden
in what is RULER's; the wording is our own.
"""

from __future__ import annotations

import random
import uuid
from dataclasses import dataclass
from typing import Any, Literal

from kvpolicy.plugins.task_role import Sample, Turn
from kvpolicy.tasks.fitting import Fitting, joined
from kvpolicy.tasks.questions import FILLER
from kvpolicy.tasks.words import compound

Kind = Literal["words", "numbers", "uuids"]
_SINGULAR = {"words": "word", "numbers": "number", "uuids": "UUID"}


@dataclass(frozen=True, slots=True)
class NeedleKind:
    """What is hidden, and whether among lines of its own kind, else in filler."""

    key: Kind
    value: Kind
    among_needles: bool


NEEDLES = {
    "niah_single_1": NeedleKind("words", "numbers", among_needles=False),
    "niah_multikey_2": NeedleKind("words", "numbers", among_needles=True),
    "niah_multikey_3": NeedleKind("uuids", "uuids", among_needles=True),
}


def needle_sample(
    kind: NeedleKind, tokenizer: Any, length: int, draw: random.Random, *, depth: float | None = None
) -> Sample:
    """One prompt of exactly `length` tokens. Raises `TextError` for a length without room.

    depth: of the needle among the lines, from 0 to 1; None for a drawn one
    """
    key, value, what = drawn_value(kind.key, draw), drawn_value(kind.value, draw), _SINGULAR[kind.value]
    head = f"The lines below hide the secret {what} of a name. Remember it: you will be asked for it."
    question = f"\nWhich secret {what} does the text give for {key}?"
    turn = Turn(question, (value,), f" The secret {what} for {key} is")
    fitting = Fitting.of(tokenizer, head, [turn], length)
    needle = fitting.ids(_line(what, key, value))
    filler = fitting.ids(f"\n{FILLER.strip()}")
    room = fitting.room(len(needle)) - len(needle)
    lines: list[list[int]] = []
    while len(line := _other(kind, fitting, key, draw) if kind.among_needles else filler) <= room:
        lines.append(line)
        room -= len(line)
    place = draw.randint(0, len(lines)) if depth is None else round(depth * len(lines))
    lines.insert(place, needle)
    return fitting.sample(joined(lines), {"depth": place / max(len(lines) - 1, 1)})


def drawn_value(kind: Kind, draw: random.Random) -> str:
    if kind == "numbers":
        return str(draw.randrange(1_000_000, 10_000_000))
    return compound(draw) if kind == "words" else str(uuid.UUID(int=draw.getrandbits(128), version=4))


def _line(what: str, key: str, value: str) -> str:
    return f"\nThe secret {what} for {key} is {value}."


def _other(kind: NeedleKind, fitting: Fitting, key: str, draw: random.Random) -> list[int]:
    """A line with another key."""
    while (other := drawn_value(kind.key, draw)) == key:
        pass
    return fitting.ids(_line(_SINGULAR[kind.value], other, drawn_value(kind.value, draw)))
