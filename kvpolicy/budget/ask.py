"""What a user asks of the memory, before a context is known."""

from __future__ import annotations

from dataclasses import dataclass

from kvpolicy.budget.plan_parts import positive
from kvpolicy.defaults import MIN_TOKENS
from kvpolicy.errors import BudgetError
from kvpolicy.model.spec import total_entries


@dataclass(frozen=True, slots=True)
class Ask:
    """How much of a context is to be kept.

    retention:      kept fraction of the tokens seen; None for a plan's only level, and with `tokens`
    tokens:         instead, mean entries per KV head
    context_length: the tokens that capacities are fixed for up front; None lets them grow with the tokens seen
    min_tokens:     mean entries per KV head that a growing budget never goes below

    Raises `BudgetError` for both of `retention` and `tokens`, and for numbers that are not whole or below 1. Which
    retentions there are, a plan knows.
    """

    retention: float | None = None
    tokens: int | None = None
    context_length: int | None = None
    min_tokens: int = MIN_TOKENS

    def __post_init__(self) -> None:
        if self.retention is not None and self.tokens is not None:
            raise BudgetError(f"both retention={self.retention} and tokens={self.tokens} were given; give one")
        object.__setattr__(self, "min_tokens", positive("min_tokens", self.min_tokens))
        for name in ("tokens", "context_length"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, positive(name, value))

    def own_retention(self) -> float:
        """The retention, where no plan has any. Raises `BudgetError` for none, and for one that is no fraction."""
        if self.retention is None:
            raise BudgetError("without a plan a cache needs retention=, the kept fraction of the tokens seen")
        if not 0 < self.retention <= 1:
            raise BudgetError(f"retention is {self.retention}, expected above 0 and at most 1 (0.3 keeps 30 %)")
        return self.retention

    def fraction(self, context: int) -> float:
        """The part that is kept of so many tokens, at most 1."""
        if self.tokens is not None:
            return min(self.tokens, context) / context
        if self.retention is None:
            raise BudgetError("retention= is missing")
        is_fixed = self.context_length is not None
        return self.retention if is_fixed else max(self.retention, min(self.min_tokens, context) / context)

    def total(self, context: int, shape: tuple[int, int]) -> int:
        """Entries of one sequence of so many tokens, over all KV heads `(L, H)`; floors may add to them."""
        return total_entries(self.fraction(context), context, shape)
