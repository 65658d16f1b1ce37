"""Trials that belong to somebody from their first moment, so that none is lost and none is one too many."""

from __future__ import annotations

import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import optuna
import psutil
from optuna.trial import FrozenTrial, TrialState, create_trial

from kvpolicy.tuning.study_notes import TrialNotes

_FIRST = -1
_OWNERLESS_SECONDS = 60.0  # a trial that another program has begun, and that for so long says nothing, is nobody's


def begin(study: optuna.Study, first: Mapping[str, Any], limit: int) -> optuna.Trial | None:
    """A running trial of this process; None where other processes have meanwhile taken its point or the last place.

    first: the point that is measured before any other
    limit: finished and running trials in all

    The trial is written down at once with its owner, and only then looked at beside the others: whoever is killed at
    any moment leaves one that can be told to be nobody's, and of two that are one too many the later gives way.
    """
    point_of, point = next(_owed(study, first), (None, {}))
    owner = here() | {"token": uuid.uuid4().hex}
    fixed = {"fixed_params": dict(point)} if point else {}
    study.add_trial(
        create_trial(state=TrialState.RUNNING, user_attrs=TrialNotes.claim(owner, point_of), system_attrs=fixed)
    )
    trials = study.get_trials(deepcopy=False)
    mine = next(trial for trial in reversed(trials) if TrialNotes(trial).owner == owner)
    before = [trial for trial in trials[: mine.number] if is_taken(trial)]
    trial = optuna.Trial(study, mine._trial_id)
    if len(before) < limit and all(point_of is None or TrialNotes(each).point != point_of for each in before):
        return trial
    TrialNotes(trial).keep_surplus()
    study.tell(trial, state=TrialState.FAIL)
    return None


def taken(study: optuna.Study) -> int:
    """Trials that are done or that a process runs; a trial that nobody has claimed is none."""
    return sum(map(is_taken, study.get_trials(deepcopy=False)))


def is_taken(trial: FrozenTrial) -> bool:
    """Whether the trial is one of those that were asked for."""
    notes = TrialNotes(trial)
    if notes.is_surplus:
        return False
    return trial.state == TrialState.COMPLETE or (trial.state == TrialState.RUNNING and notes.owner is not None)


def close_zombies(study: optuna.Study) -> int:
    """Fails every running trial whose process is gone; `begin` runs its point again. Returns how many.

    A trial of another host is left alone: whether its process lives cannot be known here.
    """
    zombies = [trial for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)) if _is_zombie(trial)]
    for trial in zombies:
        abandon(study, trial.number)
    return len(zombies)


def abandon(study: optuna.Study, number: int) -> None:
    """Ends an unfinished trial; `begin` runs its point again. One that was finished just before is left alone."""
    if not study.get_trials(deepcopy=False)[number].state.is_finished():
        study.tell(number, state=TrialState.FAIL, skip_if_finished=True)


def here() -> dict[str, Any]:
    """Name of this process, so that others can tell when it was killed."""
    process = psutil.Process()
    return {"host": socket.gethostname(), "pid": process.pid, "started": process.create_time()}


def _owed(study: optuna.Study, first: Mapping[str, Any]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Points that are yet to be run: the first one, and those of trials that were cut off."""
    trials = [trial for trial in study.get_trials(deepcopy=False) if not TrialNotes(trial).is_surplus]
    asked = {TrialNotes(trial).point for trial in trials}
    if _FIRST not in asked:
        yield _FIRST, first
    for trial in trials:
        point = {**trial.system_attrs.get("fixed_params", {}), **trial.params}  # the former: given, not yet drawn
        if trial.state == TrialState.FAIL and trial.number not in asked and point:
            yield trial.number, point


def _is_zombie(trial: FrozenTrial) -> bool:
    owner = TrialNotes(trial).owner
    if owner is None:
        begun = trial.datetime_start
        return begun is None or time.time() - begun.timestamp() > _OWNERLESS_SECONDS
    if owner["host"] != socket.gethostname():
        return False
    try:
        return bool(abs(psutil.Process(owner["pid"]).create_time() - owner["started"]) > 1.0)
    except psutil.NoSuchProcess:
        return True
