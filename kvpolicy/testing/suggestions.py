"""The laws of `suggest`, which allocators and policies have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any, Literal, TypeVar

from kvpolicy.plugins.roles import BudgetAllocator, EvictionPolicy
from kvpolicy.testing.laws import LawError, call, hold

_Searched = TypeVar("_Searched", BudgetAllocator, EvictionPolicy)
Pick = Literal["low", "high", "default"]


class RecordingTrial:
    """A `Trial` that answers with the low end, the high end or the default, and keeps its answers.

    defaults: the fields of the class with their defaults
    """

    def __init__(self, pick: Pick, defaults: dict[str, Any]) -> None:
        self.pick = pick
        self.defaults = defaults
        self.answers: dict[str, Any] = {}

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        if log and low <= 0:
            raise LawError(f"suggest_float('{name}', {low}, {high}, log=True): a logarithmic range needs low > 0")
        return float(self._number(name, low, high))

    def suggest_int(self, name: str, low: int, high: int) -> int:
        return int(self._number(name, low, high))

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        default = self._default(name)
        if default not in choices:
            raise LawError(f"the default of '{name}', {default!r}, is not among the choices {list(choices)}; add it")
        self.answers[name] = {"low": choices[0], "high": choices[-1], "default": default}[self.pick]
        return self.answers[name]

    def _number(self, name: str, low: float, high: float) -> float:
        default: float = self._default(name)
        if not low <= default <= high:
            raise LawError(
                f"the default of '{name}', {default!r}, is outside the searched range [{low}, {high}]; the search "
                "starts from the defaults, so widen the range or move the default"
            )
        answer = {"low": low, "high": high, "default": default}[self.pick]
        self.answers[name] = answer
        return answer

    def _default(self, name: str) -> Any:
        if name not in self.defaults:
            raise LawError(
                f"suggest asks for '{name}', which is no field (fields: {sorted(self.defaults)}); name each parameter "
                "like its field, because the search starts from the defaults and a plan stores the fields"
            )
        return self.defaults[name]


def suggested(cls: type[_Searched]) -> Iterator[_Searched]:
    """What `suggest` makes of the lowest, highest and default values, one after the other."""
    default = cls()
    defaults = {field.name: getattr(default, field.name) for field in fields(cls)}  # type: ignore[arg-type]
    picks: tuple[Pick, ...] = ("low", "high", "default")
    for pick in picks:
        trial = RecordingTrial(pick, defaults)
        case = f"a trial that answers with {pick} values"
        made = call(cls, "suggest", case, cls.suggest, trial)
        advice = "return cls(name=trial.suggest_float('name', ...))"
        hold(isinstance(made, cls), cls, f"suggest returns a {cls.__name__}", case, type(made).__name__, advice)
        values = {name: getattr(made, name) for name in trial.answers}
        law = f"the instance holds the answers of the trial, {trial.answers}"
        hold(values == trial.answers, cls, law, case, values, "pass each answer unchanged to the field of its name")
        yield made
