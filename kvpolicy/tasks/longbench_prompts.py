"""LongBench's prompts, which are its own: one file of its repository, at one commit."""

from __future__ import annotations

from pathlib import Path

from kvpolicy.errors import KVPolicyError, TextError
from kvpolicy.files.pinned import pinned_file
from kvpolicy.tasks.row_file import read_json

NAME = "dataset2prompt.json"
_COMMIT = "2e00731f8d0bff23dc4325161044d0ed8af94c1e"
ADDRESS = f"https://raw.githubusercontent.com/THUDM/LongBench/{_COMMIT}/LongBench/config/{NAME}"
DIGEST = "56d22ad4f382169c2b8a11ff4c982a4a1bea096c8152b0f0b85b64686b157c30"
_MOST_BYTES = 2**16


def prompt_of(task: str, kind: str, folder: str) -> str:
    """The prompt of a kind of task: of the folder's own file, or else LongBench's, fetched once.

    Raises `TextError` naming the task, or the file, where there is none.
    """
    path = Path(folder) / NAME
    if not folder or not path.exists():
        try:
            path = pinned_file(ADDRESS, DIGEST, _MOST_BYTES)
        except KVPolicyError as error:
            raise TextError(f"{task}: {error}. Give the folder that holds {NAME}, data=DIR") from None
    return read_json(path).text(kind)
