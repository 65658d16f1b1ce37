"""No trial is lost and none is one too many, whoever is killed and when."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from optuna.trial import TrialState

from kvpolicy.tuning import trials
from kvpolicy.tuning.storage import open_storage
from kvpolicy.tuning.studies import open_study
from tests.tuning.searches import make_settings, run, states, the_study

ROOT = Path(__file__).parents[2]


def running_trial(settings, owner):
    """A study with one trial left running by `owner`."""
    with_study = open_study(open_storage(settings.storage), settings.study_name(0.4), {}, resume=True)
    trial = with_study.ask()
    trial.suggest_float("x", 0, 1)
    if owner is not None:
        trial.set_user_attr("kvpolicy_owner", owner)
    return with_study, trial


@pytest.fixture
def here():
    return trials.here()


@pytest.mark.parametrize(
    ("change", "is_zombie"),
    [
        ({}, False),
        ({"pid": 2**22 + 5}, True),
        ({"started": 1.0}, True),
        ({"host": "elsewhere", "pid": 2**22 + 5}, False),
    ],
    ids=["alive", "gone", "its number was given to another process", "on another machine"],
)
def test_only_trials_whose_owner_is_gone_are_closed(tmp_path, here, change, is_zombie):
    study, trial = running_trial(make_settings(tmp_path), {**here, **change})
    assert trials.close_zombies(study) == int(is_zombie)
    assert states(study) == ["FAIL" if is_zombie else "RUNNING"]
    points = [trials.begin(study, {"x": 0.5}, 9).suggest_float("x", 0, 1) for _ in range(2)]
    assert points[0] == 0.5 and (points[1] == trial.params["x"]) == is_zombie


@pytest.mark.parametrize(("seconds", "is_zombie"), [(0, False), (120, True)])
def test_a_trial_without_an_owner_is_closed_after_a_minute(tmp_path, monkeypatch, seconds, is_zombie):
    study, _ = running_trial(make_settings(tmp_path), None)
    now = trials.time.time()
    monkeypatch.setattr(trials.time, "time", lambda: now + seconds)
    assert trials.close_zombies(study) == int(is_zombie)


def test_a_trial_belongs_to_its_process_from_the_moment_it_is_written_down(tmp_path, here, monkeypatch):
    settings = make_settings(tmp_path)
    study = open_study(open_storage(settings.storage), settings.study_name(0.4), {}, resume=True)
    seen, plain = [], study.get_trials

    def looking(*args, **more):
        seen.extend(trial.user_attrs["kvpolicy_owner"] for trial in plain(deepcopy=False))
        return plain(*args, **more)

    monkeypatch.setattr(study, "get_trials", looking)
    trials.begin(study, {}, 1)
    assert seen and all(here.items() <= owner.items() for owner in seen)


def test_the_first_point_is_measured_though_its_trial_was_cut_off_twice(tmp_path, here):
    settings = make_settings(tmp_path)
    study = open_study(open_storage(settings.storage), settings.study_name(0.4), {}, resume=True)
    for _ in range(2):
        assert trials.begin(study, {"x": 0.25}, 3).number == len(study.trials) - 1
        trials.abandon(study, len(study.trials) - 1)
    assert trials.begin(study, {"x": 0.25}, 3).suggest_float("x", 0, 1) == 0.25
    assert trials.begin(study, {"x": 0.25}, 3).suggest_float("x", 0, 1) != 0.25


def test_of_two_workers_that_begin_the_last_trial_at_once_one_gives_way(tmp_path, monkeypatch):
    settings = make_settings(tmp_path)
    mine = open_study(open_storage(settings.storage), settings.study_name(0.4), {}, resume=True)
    theirs = open_study(open_storage(settings.storage), settings.study_name(0.4), {}, resume=True)
    plain = mine.add_trial

    def both(trial):
        trials.begin(theirs, {}, 1)  # between the look at how many there are and our own
        plain(trial)

    monkeypatch.setattr(mine, "add_trial", both)
    assert trials.begin(mine, {}, 1) is None
    assert trials.places_in_use(mine) == 1 and states(mine) == ["RUNNING", "FAIL"]
    trials.abandon(theirs, 0)
    monkeypatch.undo()
    assert trials.begin(mine, {}, 1) is not None, "its place is free again"


def test_a_trial_killed_before_its_claim_is_not_counted(tmp_path):
    settings = make_settings(tmp_path, trials=3)
    run(settings)
    the_study(settings).ask()  # left running, by nobody
    run(replace(settings, resume=True, trials=5))
    assert states(the_study(settings)).count("COMPLETE") == 5


WORKER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.tuning.searches import make_settings, run
folder = Path(sys.argv[2])
run(make_settings(folder, trials=8, resume=True, storage=f"sqlite:///{folder / 'study.db'}", out=folder / "plan.json"))
"""


@pytest.mark.slow  # each process loads torch and optuna
def test_two_processes_share_a_database(tmp_path):
    settings = make_settings(tmp_path, trials=1, storage=f"sqlite:///{tmp_path / 'study.db'}")
    run(settings)
    command = [sys.executable, "-c", WORKER, str(ROOT), str(tmp_path)]
    workers = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors
    found = the_study(settings).trials
    found = [trial for trial in found if trial.state == TrialState.COMPLETE]
    assert len(found) == 8, "as asked, also when both start the last one at once"
    owners = {trial.user_attrs["kvpolicy_owner"]["pid"] for trial in found}
    assert psutil.Process().pid in owners and len(owners) >= 2
