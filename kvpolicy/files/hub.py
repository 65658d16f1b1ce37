"""Files of a repository on the Hugging Face Hub, or of a directory in its place."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from kvpolicy.errors import KVPolicyError, foreign
from kvpolicy.files.regular import read_bytes, write_bytes


@dataclass(frozen=True, slots=True)
class Place:
    """Where a file lies: a directory, or a repository of the Hub at one commit, for ever the same.

    commit: "" for a directory
    """

    name: str
    commit: str = ""

    def __str__(self) -> str:
        return f"{self.name} at {self.commit}" if self.commit else self.name


def is_directory(name: str) -> bool:
    """Whether a name means a directory: one that is there, or one that no Hub id can be."""
    return os.path.isdir(name) or name.startswith((".", "/", "~")) or os.path.isabs(name)


def is_reachable() -> bool:
    """Whether the Hub's host has an address here. Its client tries each file for half a minute where it has none."""
    from huggingface_hub import constants

    try:
        if not getproxies():
            socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, None)
    except OSError:
        return False
    return True


def fetch(source: str, file: str, revision: str | None, most: int) -> tuple[bytes, Place]:
    """The content of one file of at most `most` bytes, and where it lay. Nothing else is fetched.

    revision: branch, tag or commit on the Hub; None is its main branch

    Raises `KVPolicyError` naming source and reason.
    """
    if is_directory(source):
        path = Path(source).expanduser() / file
        try:
            return read_bytes(path, most), Place(source)
        except KVPolicyError as error:
            raise KVPolicyError(f"cannot read {path}: {error}") from None
    with foreign(f"cannot fetch {file} of {_named(source, revision)} from the Hugging Face Hub", KVPolicyError):
        path, commit = _download({"repo_id": source, "filename": file, "revision": revision}, most)
    return read_bytes(path.resolve(), most), Place(source, commit)


def dataset_file(source: str, file: str, commit: str, most: int) -> Path:
    """A file of at most `most` bytes of a data set on the Hub, at one commit: in the Hub's cache, or fetched into it.

    Nothing of it is run. Raises `KVPolicyError` naming data set and reason.
    """
    with foreign(f"cannot fetch {file} of the data set {source} from the Hugging Face Hub", KVPolicyError):
        from huggingface_hub import try_to_load_from_cache

        about = {"repo_id": source, "filename": file, "revision": commit, "repo_type": "dataset"}
        known = try_to_load_from_cache(**about)
        if isinstance(known, str):
            return Path(known)
        if not is_reachable():
            raise OSError("it cannot be reached from here")
        return _download(about, most)[0]


def publish(target: str, files: Mapping[str, bytes], message: str, *, private: bool = False) -> Place:
    """Writes files into a directory, or commits them to a repository of the Hub, which is made where there is none.

    Whoever is logged in at the Hub writes (`hf auth login`, or HF_TOKEN). Raises `KVPolicyError`.
    """
    if is_directory(target):
        folder = Path(target).expanduser()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise KVPolicyError(f"cannot write into {folder}: {error.strerror}") from None
        for name, content in files.items():
            write_bytes(folder / name, content)
        return Place(target)
    with foreign(f"cannot write to {target} on the Hugging Face Hub", KVPolicyError):
        from huggingface_hub import CommitOperationAdd

        api = _api()
        api.create_repo(target, private=private, exist_ok=True)
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()]
        return Place(target, str(api.create_commit(target, operations, commit_message=message).oid))


def _download(about: Mapping[str, Any], most: int) -> tuple[Path, str]:
    """Where a file of the Hub lies in its cache, and its commit. about: what `hf_hub_url` takes"""
    api = _api()
    address = api.get_hf_file_metadata(url=_address(api, about))
    if address.size is not None and address.size > most:
        raise KVPolicyError(
            f"{about['filename']} of {about['repo_id']} is larger than the {most // 2**20} MiB that are read of it"
        )
    commit = str(address.commit_hash or "")
    return Path(api.hf_hub_download(**{**about, "revision": commit or about["revision"]})), commit


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi(library_name="kvpolicy")


def _address(api: Any, about: Mapping[str, Any]) -> str:
    from huggingface_hub import hf_hub_url

    return hf_hub_url(**about, endpoint=api.endpoint)


def _named(source: str, revision: str | None) -> str:
    return source if revision is None else f"{source} at {revision}"
