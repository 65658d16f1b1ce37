"""What a search writes down in a study beside its trials' values. No other file knows the names of the attributes.

The names are those that studies in files and databases have: a search that an earlier version began can be resumed.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import optuna
import torch
from optuna.trial import FrozenTrial
from torch import Tensor

from kvpolicy.budget.entry_format import Format
from kvpolicy.tuning.costs import Cost

_SETTINGS = "kvpolicy_settings"
_TRIALS = "kvpolicy_trials"
_FITTED = "kvpolicy_fitted"
_OWNER = "kvpolicy_owner"
_POINT = "kvpolicy_point"
_SURPLUS = "kvpolicy_surplus"
_STOPPED = "kvpolicy_stopped"
_OUTCOME = "kvpolicy_outcome"


class StudyNotes:
    """The notes of one study.

    A study without trials is taken over by a search with other settings. So whatever is written down before the first
    trial has ended stands under a hash of the settings, and is there only for a search that has the same.
    """

    def __init__(self, study: optuna.Study) -> None:
        self._study = study

    @property
    def study_name(self) -> str:
        return self._study.study_name

    @property
    def are_ours(self) -> bool:
        """Whether a search of this package made the study."""
        return _SETTINGS in self._study.user_attrs

    @property
    def settings(self) -> Mapping[str, Any]:
        """JSON values, those that the study is for now; empty for a study that is not ours."""
        settings: Mapping[str, Any] = self._study.user_attrs.get(_SETTINGS, {})
        return settings

    def keep_settings(self, settings: Mapping[str, Any]) -> None:
        self._study.set_user_attr(_SETTINGS, settings)

    @property
    def trials(self) -> int | None:
        """How many the level is to have, as it was chosen when the study began."""
        return self._study.user_attrs.get(_TRIALS)

    def keep_trials(self, trials: int) -> None:
        self._study.set_user_attr(_TRIALS, trials)

    @property
    def fitted_shares(self) -> Tensor | None:
        """What an allocator learned, float64, as it was written down: not checked."""
        shares = self._study.user_attrs.get(_FITTED)
        return None if shares is None else torch.tensor(shares, dtype=torch.float64)

    def keep_fitted_shares(self, shares: Tensor) -> None:
        """Once the trial with them has ended, as from then on no other settings take the study over."""
        self._study.set_user_attr(_FITTED, shares.tolist())

    @property
    def fit_state(self) -> Any:
        """Where an allocator that learns was interrupted; None where it has not begun."""
        return self._of_settings("fit_state")

    def keep_fit_state(self, state: Any) -> None:
        self._keep_of_settings("fit_state", state)

    @property
    def uniform_loss(self) -> float | None:
        """Of uniform capacities on the search's sequences, the objective's."""
        return self._of_settings("uniform")

    def keep_uniform_loss(self, loss: float) -> None:
        self._keep_of_settings("uniform", loss)

    def losses(self, part: str, tables: Sequence[Tensor]) -> tuple[Tensor, Tensor | None] | None:
        """Losses of the text's sequences and of the needle prompts under these tables, float64; None before they were
        measured.

        part:   whose probes they are, search or heldout
        tables: capacities int `[L, H]` of each probe
        """
        losses = self._of_settings("losses", part, _digest([table.tolist() for table in tables]))
        if losses is None:
            return None
        text, answers = (values and torch.tensor(values, dtype=torch.float64) for values in losses)
        return text, answers

    def keep_losses(self, part: str, tables: Sequence[Tensor], text: Tensor, answers: Tensor | None) -> None:
        losses = [text.tolist(), None if answers is None else answers.tolist()]
        self._keep_of_settings("losses", losses, part, _digest([table.tolist() for table in tables]))

    def passkey_score(self, table: Tensor, entry_format: Format = None) -> float | None:
        return self._of_settings("passkey", *_passkey_names(table, entry_format))

    def keep_passkey_score(self, table: Tensor, score: float, entry_format: Format = None) -> None:
        self._keep_of_settings("passkey", score, *_passkey_names(table, entry_format))

    def cost(self, purpose: str) -> Cost:
        """The sum over all runs that went into the study. purpose: what they were for, shared or search"""
        total, prefix = Cost(), self._cost_prefix(purpose)
        for name, entry in self._study.user_attrs.items():
            if name.startswith(prefix):
                total.add(**entry)
        return total

    def keep_cost(self, purpose: str, cost: Cost) -> None:
        """As an entry of its own: of two processes none overwrites the other's."""
        self._study.set_user_attr(f"{self._cost_prefix(purpose)}{uuid.uuid4().hex}", asdict(cost))

    def _cost_prefix(self, purpose: str) -> str:
        return f"kvpolicy_cost:{purpose}:{self._settings_digest}:"

    def _of_settings(self, kind: str, *keys: str) -> Any | None:
        return self._study.user_attrs.get(self._name(kind, *keys))

    def _keep_of_settings(self, kind: str, value: Any, *keys: str) -> None:
        self._study.set_user_attr(self._name(kind, *keys), value)

    def _name(self, kind: str, *keys: str) -> str:
        return ":".join((f"kvpolicy_{kind}", self._settings_digest, *keys))

    @property
    def _settings_digest(self) -> str:
        return _digest(self._study.user_attrs.get(_SETTINGS))


def _passkey_names(table: Tensor, entry_format: Format) -> list[str]:
    return [_digest(table.tolist()), *([] if entry_format is None else [_digest(repr(entry_format))])]


class TrialNotes:
    """The notes of one trial."""

    def __init__(self, trial: optuna.Trial | FrozenTrial) -> None:
        self._trial = trial

    @staticmethod
    def claim(owner: Mapping[str, Any], point: int | None) -> dict[str, Any]:
        """The attributes that a trial is made with. point: see `TrialNotes.point`"""
        return {_OWNER: owner, _POINT: point}

    @staticmethod
    def ending(outcome: Mapping[str, Any]) -> dict[str, Any]:
        """The attributes of a trial that measures nothing, and only says what a search has come to."""
        return {_OUTCOME: outcome, _SURPLUS: True}

    @property
    def outcome(self) -> Mapping[str, Any] | None:
        """See `ending`; None for any other trial."""
        return self._trial.user_attrs.get(_OUTCOME)

    @property
    def owner(self) -> Mapping[str, Any] | None:
        """The process that runs it, or ran it; None for a trial that another program began."""
        return self._trial.user_attrs.get(_OWNER)

    @property
    def point(self) -> int | None:
        """Whose parameters it runs again: the number of a trial that was cut off, or -1 for the first point of all;
        None for a point of its own.
        """
        return self._trial.user_attrs.get(_POINT)

    @property
    def is_surplus(self) -> bool:
        """Whether it was given back, as another process had taken its place."""
        return _SURPLUS in self._trial.user_attrs

    @property
    def is_stopped(self) -> bool:
        """Whether the pruner ended it early."""
        return bool(self._trial.user_attrs.get(_STOPPED))

    def keep_surplus(self) -> None:
        self._trial.set_user_attr(_SURPLUS, True)

    def keep_stopped(self) -> None:
        self._trial.set_user_attr(_STOPPED, True)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
