"""Reading files that may be anything, and writing them so that nothing is ever half written."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from pathlib import Path

from kvpolicy.errors import KVPolicyError


def read_bytes(path: str | os.PathLike[str], most: int) -> bytes:
    """The content of a regular file of at most `most` bytes. Raises `KVPolicyError` with nothing but the reason.

    Pipes, devices and folders are refused before anything waits for them.
    """
    data = read_start(path, most + 1)
    if len(data) > most:
        raise KVPolicyError(f"larger than {most // 2**20} MiB, was another file given?")
    return data


def read_start(path: str | os.PathLike[str], most: int) -> bytes:
    """The first `most` bytes, or all there are. Raises as `read_bytes` does."""
    check_regular(path)
    try:
        with open(path, "rb") as file:
            return file.read(most)
    except OSError as error:
        raise KVPolicyError(error.strerror or str(error)) from None


def check_regular(path: str | os.PathLike[str]) -> None:
    """Raises `KVPolicyError` with nothing but the reason unless `path` leads to a regular file."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise KVPolicyError(error.strerror or str(error)) from None
    except ValueError as error:  # a zero byte
        raise KVPolicyError(str(error)) from None
    if stat.S_ISDIR(mode):
        raise KVPolicyError(os.strerror(errno.EISDIR))
    if not stat.S_ISREG(mode):
        raise KVPolicyError("a pipe or a device is there, expected a file")


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a temporary file beside `path` and moves it there. Raises `KVPolicyError` naming path and reason."""
    target = Path(os.path.realpath(path))  # a link stays a link
    if target.exists() and not target.is_file():
        raise KVPolicyError(f"cannot write {os.fspath(path)}: a directory or device is there")
    temporary = target.parent / f".kvpolicy-{secrets.token_hex(8)}.tmp"
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise KVPolicyError(f"cannot write {os.fspath(path)}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
