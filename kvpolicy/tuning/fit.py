"""Shares that an allocator learns for one level, kept in the level's study."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kvpolicy.measure.delegate import DelegateProbe
from kvpolicy.model.spec import Budget, Importance
from kvpolicy.plugins import plugin_call
from kvpolicy.plugins.roles import BudgetAllocator, ModelProbe
from kvpolicy.progress import Progress
from kvpolicy.tuning.study_notes import StudyNotes


def fitted_shares(
    allocator: BudgetAllocator,
    probe: ModelProbe,
    importance: Importance,
    budget: Budget,
    notes: StudyNotes,
    progress: Progress,
) -> Tensor | None:
    """What the allocator learns, or learned before in a study that is resumed; None if it does not learn."""
    if (shares := notes.fitted_shares) is not None:
        progress.note(f"{notes.study_name}: learned before, in this study")
        return plugin_call.checked_shares(allocator, "fit", shares, budget.shape)
    shares = plugin_call.learned_shares(allocator, FittingProbe(probe, notes, progress), importance, budget)
    return None if shares is None else shares.double()


class FittingProbe(DelegateProbe):
    """Keeps the state of a `fit` in its study, under the settings that the study is for now, and tells of its steps."""

    def __init__(self, probe: ModelProbe, notes: StudyNotes, progress: Progress) -> None:
        super().__init__(probe)
        self._notes, self._progress = notes, progress

    @property
    def progress(self) -> Progress:
        return self._progress

    def saved(self) -> Any:
        return self._notes.fit_state

    def save(self, state: Any) -> None:
        self._notes.keep_fit_state(state)
