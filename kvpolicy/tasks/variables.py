"""Variable tracking: a value that is handed from variable to variable, in lines that stand among others.

Source: RULER, arXiv:2404.06654, `vt`; SCBench, arXiv:2412.10319, asks for several chains of one context in turn. The
rules are theirs; the wording is our own.
"""

from __future__ import annotations

import itertools
import random
import string
from typing import Any, TypeVar

from kvpolicy.plugins.task_role import Sample, Turn
from kvpolicy.tasks.fitting import Fitting, joined, taken
from kvpolicy.tasks.questions import FILLER

T = TypeVar("T")

HOPS = 4
"""A chain has one variable more."""
_HEAD = "In the lines below, variables are given values. Remember which variable has which value.\n"
_EXAMPLE_LINES = 5  # of filler, in the worked example


def variables_sample(tokenizer: Any, length: int, draw: random.Random, *, chains: int = 1) -> Sample:
    """One prompt of exactly `length` tokens, behind a worked example; a turn for each of `chains`.

    Raises `TextError` for a length without room.
    """
    drawn = [_chain(draw, letters=5) for _ in range(chains)]
    fitting = Fitting.of(tokenizer, f"{_example(draw)}\n\n{_HEAD}", [_turn(*chain) for chain in drawn], length)
    parts = [[fitting.ids(f"\n{line}") for line in _lines(*chain)] for chain in drawn]
    filler = fitting.ids(f"\n{FILLER.strip()}")
    count = fitting.room(sum(map(taken, parts))) - sum(map(taken, parts))
    body = [filler] * (count // len(filler))
    for part in parts:
        body = _threaded(body, part, draw)
    return fitting.sample(joined(body))


def _chain(draw: random.Random, letters: int) -> tuple[str, list[str]]:
    """A value, and the variables that have it, in the order in which they get it."""
    names: dict[str, None] = {}
    while len(names) <= HOPS:
        names["".join(draw.choices(string.ascii_uppercase, k=letters))] = None
    return str(draw.randrange(10_000, 100_000)), list(names)


def _lines(value: str, names: list[str]) -> list[str]:
    handed = [f"VAR {later} = VAR {first}" for first, later in itertools.pairwise(names)]
    return [f"VAR {names[0]} = {value}", *handed]


def _turn(value: str, names: list[str]) -> Turn:
    question = f"\nQuestion: Which variables have the value {value} in the text above?"
    return Turn(question, tuple(names), f" Answer: The {len(names)} variables with the value {value} are:")


def _threaded(body: list[T], part: list[T], draw: random.Random) -> list[T]:
    """The body with the parts between its pieces, in their order."""
    places = sorted(draw.choices(range(len(body) + 1), k=len(part)))
    whole, begun = [], 0
    for place, piece in zip(places, part, strict=True):
        whole += [*body[begun:place], piece]
        begun = place
    return whole + body[begun:]


def _example(draw: random.Random) -> str:
    """A short prompt of the same kind, with its answer."""
    value, names = _chain(draw, letters=3)
    lines = _threaded([FILLER.strip()] * _EXAMPLE_LINES, _lines(value, names), draw)
    turn = _turn(value, names)
    return "\n".join([_HEAD, *lines]) + f"{turn.question}{turn.prefix} {' '.join(names)}"
