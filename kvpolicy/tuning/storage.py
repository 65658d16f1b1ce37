"""Studies on disk or in a database: opening, repairing after a crash, refusing what does not belong."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
import psutil
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, GrpcStorageProxy, JournalStorage, get_storage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState

from kvpolicy.errors import StudyError

_SETTINGS = "kvpolicy_settings"
_OWNER = "kvpolicy_owner"
_OWNERLESS_SECONDS = 60.0  # a trial without an owner for longer was killed before it could say whose it is


def open_storage(url: str | None, journal: Path) -> BaseStorage:
    """A journal file by default; else any Optuna storage URL, or `grpc://host:port` for Optuna's proxy.

    Raises `StudyError` when the storage cannot be reached or written.
    """
    try:
        if url is None:
            repair_journal(journal)
            return JournalStorage(JournalFileBackend(str(journal), lock_obj=JournalFileOpenLock(str(journal))))
        if url.startswith("grpc://"):
            host, _, port = url.removeprefix("grpc://").partition(":")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                return GrpcStorageProxy(host=host, port=int(port or 13000))
        return _open_database(url)
    except ImportError as error:
        raise StudyError(
            f"the study storage {url} needs a package that is not installed ({_first_line(error)}): for PostgreSQL "
            "pip install 'psycopg[binary]', for grpc:// pip install grpcio protobuf"
        ) from error
    except Exception as error:  # each backend raises its own family
        where = str(journal) if url is None else url
        raise StudyError(f"cannot open the study storage {where}: {_first_line(error)}") from error


def _open_database(url: str) -> BaseStorage:
    """A second try after a second: of two processes that meet a new database, only one can create its tables."""
    try:
        return get_storage(url)
    except ImportError:
        raise
    except Exception:  # each driver raises its own family
        time.sleep(1.0)
        return get_storage(url)


def repair_journal(path: Path) -> bool:
    """Cuts a torn last line, which a killed writer leaves and which would make the whole journal unreadable.

    The damaged file is kept as `*.bak`. Returns whether something was cut.
    """
    if not path.exists():
        return False
    lock = JournalFileOpenLock(str(path))
    lock.acquire()
    try:
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole == content:
            return False
        shutil.copy2(path, path.with_name(path.name + ".bak"))
        with path.open("r+b") as file:
            file.truncate(len(whole))
            os.fsync(file.fileno())
        return True
    finally:
        lock.release()


def open_study(storage: BaseStorage, name: str, settings: Mapping[str, Any], *, resume: bool) -> optuna.Study:
    """Creates the study, or goes on with it if `resume` and every setting agrees.

    Raises `StudyError` for a study that is there without `resume`, and for one made with other settings.
    """
    try:
        study = optuna.create_study(storage=storage, study_name=name, direction="minimize", load_if_exists=True)
    except Exception as error:  # each backend raises its own family
        raise StudyError(f"cannot open the study '{name}': {_first_line(error)}") from error
    stored = study.user_attrs.get(_SETTINGS)
    if stored is None or not study.get_trials(deepcopy=False):  # nothing would be lost
        study.set_user_attr(_SETTINGS, json.loads(json.dumps(settings)))
        return study
    if not resume:
        raise StudyError(
            f"a study named '{name}' is there already, with {len(study.trials)} trials: pass --resume to go on with "
            "it, or choose another --out"
        )
    asked = json.loads(json.dumps(settings))
    different = [key for key in sorted(stored.keys() | asked.keys()) if stored.get(key) != asked.get(key)]
    if different:
        lines = ", ".join(f"{key} was {_brief(stored.get(key))}, now {_brief(asked.get(key))}" for key in different)
        raise StudyError(f"the study '{name}' was made with other settings ({lines}): choose another --out")
    return study


def study_settings(attributes: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings a study was made with, of its user attributes; empty for a study that is not ours."""
    stored: Mapping[str, Any] = attributes.get(_SETTINGS, {})
    return stored


def settings_digest(study: optuna.Study) -> str:
    """Of the settings a study is for now: what was kept in it under others, before its first trial, is not its own."""
    text = json.dumps(study.user_attrs.get(_SETTINGS), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def claim(trial: optuna.Trial) -> None:
    """Writes down who runs the trial, so that others can tell when it was killed."""
    process = psutil.Process()
    trial.set_user_attr(_OWNER, {"host": socket.gethostname(), "pid": process.pid, "started": process.create_time()})


def is_claimed(trial: FrozenTrial) -> bool:
    """Whether a process has said that it runs the trial."""
    return _OWNER in trial.user_attrs


def close_zombies(study: optuna.Study) -> int:
    """Fails every running trial whose process is gone, and queues its parameters again. Returns how many.

    A trial of another host is left alone: whether its process lives cannot be known here.
    """
    zombies = [trial for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)) if _is_zombie(trial)]
    for trial in zombies:
        abandon(study, trial.number)
    return len(zombies)


def abandon(study: optuna.Study, number: int) -> None:
    """Ends an unfinished trial and queues its point, so that nothing of the search is lost.

    A trial that was finished just before is left alone.
    """
    trial = study.get_trials(deepcopy=False)[number]
    if trial.state.is_finished():
        return
    study.tell(number, state=TrialState.FAIL, skip_if_finished=True)
    point = {**trial.system_attrs.get("fixed_params", {}), **trial.params}  # the former: queued, not yet drawn
    if point:
        study.enqueue_trial(point)


def _is_zombie(trial: FrozenTrial) -> bool:
    owner = trial.user_attrs.get(_OWNER)
    if owner is None:
        begun = trial.datetime_start
        return begun is None or time.time() - begun.timestamp() > _OWNERLESS_SECONDS
    if owner["host"] != socket.gethostname():
        return False
    try:
        return bool(abs(psutil.Process(owner["pid"]).create_time() - owner["started"]) > 1.0)
    except psutil.NoSuchProcess:
        return True


def _brief(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
