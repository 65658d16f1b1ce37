"""What a user writes under `kvpolicy` in vLLM's additional config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from kvpolicy import BudgetError

KEY = "kvpolicy"


@dataclass(frozen=True, slots=True)
class Settings:
    """A plan, and how much of it.

    plan:           path of a plan file
    tokens:         mean entries per KV head, whatever the length
    retention:      kept fraction of the tokens
    context_length: tokens that `tokens` or `retention` are a part of

    Raises `BudgetError`, naming the field, for anything else.
    """

    plan: str
    tokens: int | None = None
    retention: float | None = None
    context_length: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.plan, str) or not self.plan:
            raise _error("plan", self.plan, "the path of a plan file")
        for name in ("tokens", "context_length"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise _error(name, value, "a whole number of at least 1")
        value = self.retention
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1):
            raise _error("retention", value, "a number above 0 and at most 1")
        if (self.tokens is None) == (self.retention is None):
            raise BudgetError(f"additional_config.{KEY}: expected one of tokens and retention beside the plan")

    @classmethod
    def read(cls, additional_config: object) -> Self | None:
        """None where vLLM is to be left alone: no key, nothing to do."""
        if not isinstance(additional_config, Mapping) or KEY not in additional_config:
            return None
        value: Any = additional_config[KEY]
        if not isinstance(value, Mapping):
            raise BudgetError(f"additional_config.{KEY} is {value!r}, expected an object with plan, and tokens")
        names = [field.name for field in fields(cls)]
        if unknown := sorted(set(value) - set(names)):
            raise BudgetError(f"additional_config.{KEY}.{unknown[0]} is unknown; the fields are {', '.join(names)}")
        if "plan" not in value:
            raise BudgetError(f"additional_config.{KEY}.plan is missing, expected the path of a plan file")
        return cls(**value)


def _error(name: str, value: object, expected: str) -> BudgetError:
    return BudgetError(f"additional_config.{KEY}.{name} is {value!r}, expected {expected}")
