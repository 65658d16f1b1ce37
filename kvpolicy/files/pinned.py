"""A file of the network that is known by its sum."""

from __future__ import annotations

import hashlib
import urllib.request
from pathlib import Path

from kvpolicy.errors import KVPolicyError, foreign
from kvpolicy.files.regular import read_bytes, write_bytes
from kvpolicy.files.user_cache import cache_directory

_SECONDS = 10  # without an answer


def pinned_file(address: str, digest: str, most: int) -> Path:
    """The file: in the cache directory, or fetched into it. digest: its SHA-256;  most: bytes that it may have

    Raises `KVPolicyError` naming the address where it cannot be fetched, and where it is another file by now.
    """
    path = cache_directory() / "files" / digest[:16] / address.rsplit("/", 1)[-1]
    if path.exists() and _digest(read_bytes(path, most)) == digest:
        return path
    attempt = foreign(f"cannot fetch {address}", KVPolicyError)
    with attempt, urllib.request.urlopen(address, timeout=_SECONDS) as answer:
        content = answer.read(most + 1)
    if (came := _digest(content)) != digest:
        raise KVPolicyError(f"{address} is another file by now: its SHA-256 is {came}, expected {digest}")
    with foreign(f"cannot write {path}", KVPolicyError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content)
    return path


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
