"""What the number of a level means: a part of the entries, or of the full cache's bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvpolicy.budget.apportion import apportion
from kvpolicy.budget.entries import capacities, context_budget
from kvpolicy.budget.entry_format import LayerFormats, name_of
from kvpolicy.budget.plan import kept_fractions
from kvpolicy.cache.size import holds_scores
from kvpolicy.cache.weight import byte_budget, even_retention
from kvpolicy.errors import BudgetError
from kvpolicy.model.spec import Budget
from kvpolicy.plugins.roles import EvictionPolicy, ModelProbe
from kvpolicy.tuning.probes import Target
from kvpolicy.tuning.settings import TuneSettings


def level_table(target: ModelProbe, shares: Tensor, retention: float, context: int, least: int | None = None) -> Tensor:
    """Capacities `[L, H]` of a context, through the same two steps as `BudgetPlan.capacities`.

    target: what says which model it is for
    least:  the fewest entries of a KV head; None for the target's
    """
    total = target.spec.total_entries(retention, context)
    return capacities(kept_fractions(shares, retention), total, context, least or target.least_capacity)


@dataclass(frozen=True, slots=True, eq=False)
class Sizes:
    """Budgets of levels. A level is what the user asked for.

    by_bytes: whether that is a part of the full cache's bytes, and not of its entries
    dtype:    of the full cache's keys and values
    """

    by_bytes: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, settings: TuneSettings, dtype: torch.dtype) -> Sizes:
        """Those of a search that runs in `dtype`. Where that was chosen by its speed on this machine, bytes are as of
        16-bit numbers, in which models are run elsewhere.
        """
        return cls(bool(settings.memories), torch.bfloat16 if settings.choose_dtype else dtype)

    def budget(self, target: Target, policy: EvictionPolicy, level: float, context: int) -> Budget:
        """In bytes where the layers of the target's format differ, so that entries do not all take the same; else in
        entries.

        Raises `BudgetError` for bytes into which everything goes, or not even the fewest entries of each KV head.
        """
        spec = target.spec
        if not self.by_bytes:
            return context_budget(spec.total_entries(level, context), spec.table_shape, context, target.least_capacity)
        scored, own = holds_scores(policy, None), target.entry_format
        budget = byte_budget(float(level), spec, context, self.dtype, policy, own, scored=scored)
        assert budget.cost is not None  # in bytes
        if budget.total == int((budget.ceilings() * budget.cost).sum()):
            raise BudgetError(
                f"memory={level:g} holds a whole context in format={name_of(own)}: nothing is searched, give less"
            )
        if isinstance(own, LayerFormats):
            return budget
        total = spec.total_entries(even_retention(budget), context)
        return context_budget(total, spec.table_shape, context, target.least_capacity)

    def table(self, target: Target, policy: EvictionPolicy, shares: Tensor, level: float, context: int) -> Tensor:
        """Capacities `[L, H]` of a context."""
        if not self.by_bytes:
            return level_table(target, shares, level, context)
        budget = self.budget(target, policy, level, context)
        if budget.cost is not None:
            return apportion(shares, budget)
        return level_table(target, shares, budget.total / int(budget.ceilings().sum()), context)

    def kept(self, target: Target, policy: EvictionPolicy, shares: Tensor, level: float) -> Tensor:
        """The fractions of the context that KV heads keep, float64 `[L, H]`: a plan's shares."""
        if not self.by_bytes:
            return kept_fractions(shares, level)
        context = target.context_length
        budget = self.budget(target, policy, level, context)
        if budget.cost is not None:
            return apportion(shares, budget).double() / context
        return kept_fractions(shares, budget.total / int(budget.ceilings().sum()))
