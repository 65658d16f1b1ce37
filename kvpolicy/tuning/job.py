"""What all levels of a search have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from kvpolicy.model.spec import Budget, Importance, ModelSpec
from kvpolicy.progress import Progress
from kvpolicy.tuning.known_losses import known_losses
from kvpolicy.tuning.probes import Losses, Probes
from kvpolicy.tuning.search_method import SearchMethod
from kvpolicy.tuning.settings import TuneSettings
from kvpolicy.tuning.sizes import Sizes
from kvpolicy.tuning.study_notes import StudyNotes


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """sizes: what the levels mean;  heldout_full: held-out losses under the full cache;  trials: of each level"""

    settings: TuneSettings
    sizes: Sizes
    spec: ModelSpec
    method: SearchMethod
    importance: Importance
    search: Probes
    heldout: Probes
    heldout_full: Losses
    trials: int
    progress: Progress

    def budget(self, level: float, context: int) -> Budget:
        return self.sizes.budget(self.search.target, self.method.policy, level, context)

    def table(self, shares: Tensor, level: float, context: int) -> Tensor:
        """Capacities `[L, H]` of a context."""
        return self.sizes.table(self.search.target, self.method.policy, shares, level, context)

    def kept(self, shares: Tensor, level: float) -> Tensor:
        """The shares as a plan stores them, float64 `[L, H]`."""
        return self.sizes.kept(self.search.target, self.method.policy, shares, level)

    def losses(self, notes: StudyNotes, part: Literal["search", "heldout"], shares: Tensor, level: float) -> Losses:
        """Of text and answers under these shares, measured once and then kept in the level's study."""
        probes = self.search if part == "search" else self.heldout
        return known_losses(notes, part, probes, lambda context: self.table(shares, level, context))
