"""Where studies are kept, and finding one there: memory, a journal file, a database."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import BaseStorage, GrpcStorageProxy, InMemoryStorage, JournalStorage, get_storage
from optuna.storages.journal import JournalFileBackend

from kvpolicy.errors import StudyError, first_line
from kvpolicy.tuning.storage_url import hidden, shown
from kvpolicy.tuning.study_notes import StudyNotes

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None  # type: ignore[assignment]

_CHOSEN = "dtype"
"""The setting that a resumed study has for itself, where nobody says otherwise."""


def open_storage(storage: str | Path | None) -> BaseStorage:
    """None is memory, a path is a journal file; else any Optuna storage URL, or `grpc://host:port` for Optuna's proxy.

    Raises `StudyError` when the storage cannot be reached or written.
    """
    if storage is None:
        return InMemoryStorage()
    try:
        if not _is_url(storage):
            repair_journal(Path(storage))
            return JournalStorage(_Journal(str(storage)))
        return _open_url(str(storage))
    except ImportError as error:
        raise StudyError(
            f"the study storage {shown(storage)} needs a package that is not installed "
            f"({hidden(first_line(error), storage)}): for PostgreSQL pip install 'psycopg[binary]', for grpc:// pip "
            "install grpcio protobuf"
        ) from None
    except Exception as error:  # each backend raises its own family
        said = f"cannot open the study storage {shown(storage)}: {hidden(first_line(error), storage)}"
        raise StudyError(said) from None  # what a driver raises may hold the password


def _is_url(storage: str | Path) -> bool:
    return isinstance(storage, str) and "://" in storage


def journal_of(storage: str | Path | None) -> Path | None:
    """The file that the trials are written to; None for memory and databases."""
    return None if storage is None or _is_url(storage) else Path(storage)


def _open_url(url: str) -> BaseStorage:
    """A second try after a second: of two processes that meet a new database, only one can create its tables."""
    if url.startswith("grpc://"):
        host, _, port = url.removeprefix("grpc://").partition(":")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            return GrpcStorageProxy(host=host, port=int(port or 13000))
    try:
        return get_storage(url)
    except ImportError:
        raise
    except Exception:  # each driver raises its own family
        time.sleep(1.0)
        return get_storage(url)


class _Journal(JournalFileBackend):
    """Optuna's journal file under the kernel's lock, which ends with its process, however that ends."""

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Whole lines or none. Raises `StudyError` where they cannot be written."""
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()
        try:
            with _locked(Path(self._file_path)) as file:
                before = file.seek(0, os.SEEK_END)
                try:
                    while lines:
                        lines = lines[file.write(lines) :]  # what fits goes in before a full disk is an error
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(before)
                    raise
        except OSError as error:
            raise StudyError(
                f"cannot write the study {self._file_path}: {error.strerror}; the trials before are kept, and "
                "resume=True goes on with them"
            ) from None


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """The file, unbuffered, for this process alone."""
    with path.open("r+b", buffering=0) as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file


@contextmanager
def storage_errors(storage: str | Path | None) -> Iterator[None]:
    """Around a search: a database that is lost on the way is a `StudyError`, without its password."""
    try:
        yield
    except StorageInternalError as error:
        raise StudyError(f"the study storage {shown(storage)} failed: {hidden(first_line(error), storage)}") from None


def repair_journal(path: Path) -> bool:
    """Cuts a torn last line, which a killed writer leaves and which would make the whole journal unreadable.

    The damaged file is kept as `*.bak`. Returns whether something was cut. Raises `StudyError` for no regular file.
    """
    if not path.exists():
        return False
    if not path.is_file():
        raise StudyError(f"{path} is no regular file")
    with _locked(path) as file:
        content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        if whole == content:
            return False
        shutil.copy2(path, path.with_name(path.name + ".bak"))
        file.truncate(len(whole))
        os.fsync(file.fileno())
        return True


def find_studies(storage: BaseStorage, name: str, settings: Mapping[str, Any] | None = None) -> list[optuna.Study]:
    """The studies with trials that were begun under `name`, oldest first; with `settings`, those made for them.

    name: without what `open_study` adds to it
    """
    digest = "[0-9a-f]{8}" if settings is None else _digest(settings)
    pattern = re.compile(rf"{re.escape(name)}-{digest}(-(\d+))?")
    found = []
    for known in storage.get_all_studies():
        if match := pattern.fullmatch(known.study_name):
            study = optuna.load_study(study_name=known.study_name, storage=storage)
            if StudyNotes(study).are_ours and study.get_trials(deepcopy=False):
                found.append((int(match[2] or 1), known._study_id, study))
    return [study for *_, study in sorted(found, key=lambda each: each[:2])]


def open_study(storage: BaseStorage, name: str, settings: Mapping[str, Any], *, resume: bool) -> optuna.Study:
    """With `resume` the newest study with these settings, where there is one; otherwise a new one.

    Its name carries a hash of the settings and, behind the first one, a number, so that what is there stays as it is.

    Raises `StudyError` with `resume` where all that is there was made with other settings.
    """
    asked = json.loads(json.dumps(settings))
    earlier = find_studies(storage, name, settings)
    if resume and earlier:
        _check_same(earlier[-1], asked)
        return earlier[-1]
    if resume and (others := find_studies(storage, name)):
        _check_same(others[-1], asked)
    base, number = f"{name}-{_digest(settings)}", len(earlier) + 1
    while True:
        full = base if number == 1 else f"{base}-{number}"
        try:
            study = optuna.create_study(storage=storage, study_name=full, direction="minimize", load_if_exists=True)
        except Exception as error:  # each backend raises its own family
            raise StudyError(f"cannot open the study '{full}': {first_line(error)}") from None
        if resume or not study.get_trials(deepcopy=False):  # nothing would be lost
            StudyNotes(study).keep_settings(asked)
            return study
        number += 1


def _check_same(study: optuna.Study, asked: Mapping[str, Any]) -> None:
    stored = StudyNotes(study).settings
    different = [key for key in sorted(stored.keys() | asked.keys()) if stored.get(key) != asked.get(key)]
    if different:
        lines = ", ".join(f"{key} was {_brief(stored.get(key))}, now {_brief(asked.get(key))}" for key in different)
        raise StudyError(
            f"the study '{study.study_name}' was made with other settings ({lines}): give those again, or leave "
            "out resume=True to begin a new search beside it"
        )


def _digest(settings: Mapping[str, Any]) -> str:
    """Of what was asked for; a dtype that was chosen is none of it."""
    asked = {name: value for name, value in settings.items() if name != _CHOSEN}
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:8]


def _brief(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
