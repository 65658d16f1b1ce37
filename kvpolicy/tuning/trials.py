"""Trials that belong to somebody from their first moment, so that none is lost and none is one too many.

Several processes may work on one study, and each may be killed at any moment. There is no lock between them: a storage
only promises that trials are numbered one after another and that attributes which a trial is made with appear with it.
So whoever wants to run a trial writes it down first and looks around second.
"""

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

_FIRST = -1  # stands for the number of a trial where the point is the first one, which no trial was cut off in
_OWNERLESS_SECONDS = 60.0  # a trial that another program has begun, and that for so long says nothing, is nobody's


def begin(study: optuna.Study, first: Mapping[str, Any], limit: int) -> optuna.Trial | None:
    """A running trial of this process; None where other processes have meanwhile taken its point or the last place.

    first: the point that is measured before any other
    limit: finished and running trials in all

    The trial is written down at once with its owner, and only then looked at beside the others: whoever is killed at
    any moment leaves one that can be told to be nobody's, and of two that are one too many the later gives way.
    """
    point_of, point = next(_owed_points(study, first), (None, {}))
    # The token tells two trials of one process apart: `add_trial` does not say which number it has given.
    owner = here() | {"token": uuid.uuid4().hex}
    fixed = {"fixed_params": dict(point)} if point else {}
    # `study.ask` would create the trial first and write its attributes later: killed in between, it had no owner.
    study.add_trial(
        create_trial(state=TrialState.RUNNING, user_attrs=TrialNotes.claim(owner, point_of), system_attrs=fixed)
    )
    trials = study.get_trials(deepcopy=False)
    mine = next(trial for trial in reversed(trials) if TrialNotes(trial).owner == owner)
    # Only those before: the two workers see the same order, so exactly one of them gives way.
    before = [trial for trial in trials[: mine.number] if has_place(trial)]
    trial = optuna.Trial(study, mine._trial_id)
    if len(before) < limit and all(point_of is None or TrialNotes(other).point != point_of for other in before):
        return trial
    TrialNotes(trial).keep_surplus()  # before it fails: a failed trial's point would be run again
    study.tell(trial, state=TrialState.FAIL)
    return None


def places_in_use(study: optuna.Study) -> int:
    """Trials that are done or that a process runs; a trial that nobody has claimed is none."""
    return sum(map(has_place, study.get_trials(deepcopy=False)))


def has_place(trial: FrozenTrial) -> bool:
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
        study.tell(number, state=TrialState.FAIL, skip_if_finished=True)  # another worker may close the same zombie


def outcome_of(study: optuna.Study) -> Mapping[str, Any] | None:
    """What the search has come to; None while it goes on."""
    outcomes = (TrialNotes(trial).outcome for trial in study.get_trials(deepcopy=False))
    return next((outcome for outcome in outcomes if outcome is not None), None)


def end(study: optuna.Study, outcome: Mapping[str, Any]) -> Mapping[str, Any]:
    """Ends a search for good, and returns what it has come to: of several processes that of the first, for all.

    outcome: JSON values
    """
    study.add_trial(create_trial(state=TrialState.FAIL, user_attrs=TrialNotes.ending(outcome)))
    return outcome_of(study) or outcome


def here() -> dict[str, Any]:
    """Name of this process, so that others can tell when it was killed. The start tells apart two with one number."""
    process = psutil.Process()
    return {"host": socket.gethostname(), "pid": process.pid, "started": process.create_time()}


def _owed_points(study: optuna.Study, first: Mapping[str, Any]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Points that are yet to be run, each with the number of the trial it is from: the first one, and those of trials
    that were cut off.

    The sampler would not draw them again: it is seeded by the number of trials, which has grown by the one cut off.
    """
    trials = [trial for trial in study.get_trials(deepcopy=False) if not TrialNotes(trial).is_surplus]
    rerun = {TrialNotes(trial).point for trial in trials}  # a second one cut off passes the point on under its number
    if _FIRST not in rerun:
        yield _FIRST, first
    for trial in trials:
        # cut off before all of it was drawn, the rest of the point is still among the fixed parameters
        point = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
        if trial.state == TrialState.FAIL and trial.number not in rerun and point:
            yield trial.number, point


def _is_zombie(trial: FrozenTrial) -> bool:
    owner = TrialNotes(trial).owner
    if owner is None:
        start = trial.datetime_start
        return start is None or time.time() - start.timestamp() > _OWNERLESS_SECONDS
    if owner["host"] != socket.gethostname():
        return False
    try:
        # the same number may be another process's by now; a second is for a clock that was set meanwhile
        return bool(abs(psutil.Process(owner["pid"]).create_time() - owner["started"]) > 1.0)
    except psutil.NoSuchProcess:
        return True
