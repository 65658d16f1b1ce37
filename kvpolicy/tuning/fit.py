"""Shares that an allocator learns for one level, kept in the level's study."""

from __future__ import annotations

from typing import Any

import optuna
import torch
from torch import Tensor

from kvpolicy.measure.delegate import DelegateProbe
from kvpolicy.model.spec import Budget, Importance
from kvpolicy.plugins import plugin_call
from kvpolicy.plugins.roles import BudgetAllocator, ModelProbe
from kvpolicy.progress import Progress
from kvpolicy.tuning.storage import settings_digest

_FITTED = "kvpolicy_fitted"
_STATE = "kvpolicy_fit_state"


def fitted_shares(
    allocator: BudgetAllocator,
    probe: ModelProbe,
    importance: Importance,
    budget: Budget,
    study: optuna.Study,
    progress: Progress,
) -> Tensor | None:
    """What the allocator learns, or learned before in a study that is resumed; None if it does not learn."""
    kept = study.user_attrs.get(_FITTED)
    if kept is not None:
        progress.note(f"{study.study_name}: learned before, in this study")
        return plugin_call.checked_shares(allocator, "fit", torch.tensor(kept, dtype=torch.float64), budget.shape)
    learned = plugin_call.learned_shares(allocator, FittingProbe(probe, study, progress), importance, budget)
    return None if learned is None else learned.double()


def keep_fitted(study: optuna.Study, shares: Tensor) -> None:
    """Once its trial has run: from then on the study is not taken over by other settings."""
    study.set_user_attr(_FITTED, shares.tolist())


class FittingProbe(DelegateProbe):
    """Keeps the state of a `fit` in its study, under the settings that the study is for now, and tells of its steps."""

    def __init__(self, probe: ModelProbe, study: optuna.Study, progress: Progress) -> None:
        super().__init__(probe)
        self._study, self._progress = study, progress

    @property
    def progress(self) -> Progress:
        return self._progress

    def saved(self) -> Any:
        return self._study.user_attrs.get(self._name)

    def save(self, state: Any) -> None:
        self._study.set_user_attr(self._name, state)

    @property
    def _name(self) -> str:
        return f"{_STATE}:{settings_digest(self._study)}"
