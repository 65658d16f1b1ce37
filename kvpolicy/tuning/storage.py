"""Where studies are kept: memory, a journal file, a database."""

from __future__ import annotations

import json
import os
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import BaseStorage, GrpcStorageProxy, InMemoryStorage, JournalStorage, get_storage
from optuna.storages.journal import JournalFileBackend

from kvpolicy.errors import StudyError, first_line
from kvpolicy.tuning.storage_url import hidden, shown

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None  # type: ignore[assignment]


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
        message = f"cannot open the study storage {shown(storage)}: {hidden(first_line(error), storage)}"
        raise StudyError(message) from None  # what a driver raises may hold the password


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
