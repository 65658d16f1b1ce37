"""Writing files so that nothing is ever half written."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from kvpolicy.errors import KVPolicyError


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
