"""What all levels of a search have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from kvpolicy.budget.entries import capacities, context_budget
from kvpolicy.budget.plan import kept_fractions
from kvpolicy.model.spec import Budget, Importance, ModelSpec
from kvpolicy.plugins.roles import ModelProbe
from kvpolicy.progress import Progress
from kvpolicy.tuning.known_losses import known_losses
from kvpolicy.tuning.probes import Losses, Probes
from kvpolicy.tuning.search_method import SearchMethod
from kvpolicy.tuning.settings import TuneSettings
from kvpolicy.tuning.study_notes import StudyNotes


def level_table(target: ModelProbe, shares: Tensor, retention: float, context: int) -> Tensor:
    """Capacities `[L, H]` of a context, through the same two steps as `BudgetPlan.capacities`.

    target: what says which model it is for, and the fewest entries of a KV head
    """
    total = target.spec.total_entries(retention, context)
    return capacities(kept_fractions(shares, retention), total, context, target.least_capacity)


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """heldout_full: the held-out losses under the full cache;  trials: of each level"""

    settings: TuneSettings
    spec: ModelSpec
    method: SearchMethod
    importance: Importance
    search: Probes
    heldout: Probes
    heldout_full: Losses
    trials: int
    progress: Progress

    def budget(self, retention: float, context: int) -> Budget:
        total, least = self.spec.total_entries(retention, context), self.search.target.least_capacity
        return context_budget(total, self.spec.table_shape, context, least)

    def table(self, shares: Tensor, retention: float, context: int) -> Tensor:
        """Capacities `[L, H]` of a context."""
        return level_table(self.search.target, shares, retention, context)

    def losses(self, notes: StudyNotes, part: Literal["search", "heldout"], shares: Tensor, retention: float) -> Losses:
        """Of text and answers under these shares, measured once and then kept in the level's study."""
        probes = self.search if part == "search" else self.heldout
        return known_losses(notes, part, probes, lambda context: self.table(shares, retention, context))
