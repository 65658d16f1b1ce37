"""LongBench's rows on the Hugging Face Hub: an archive of JSONL files, of which one is read, and nothing is run."""

from __future__ import annotations

from zipfile import ZipFile

from kvpolicy.errors import KVPolicyError, TextError, foreign
from kvpolicy.files.hub import dataset_file
from kvpolicy.tasks.row_file import MAX_BYTES, Row, rows_in

REPOSITORY = "zai-org/LongBench"
COMMIT = "5e628be450b7e67fb7ae6e201bd6d8f7056f7672"
_ARCHIVE, _MOST_BYTES = "data.zip", 256 * 2**20  # it has 109 MiB


def archive_rows(task: str, name: str) -> list[Row]:
    """The rows of `data/NAME.jsonl`, of the Hub's cache or fetched into it. Raises `TextError` naming the task."""
    member = f"data/{name}.jsonl"
    try:
        path = dataset_file(REPOSITORY, _ARCHIVE, COMMIT, _MOST_BYTES)
    except KVPolicyError as error:
        raise TextError(f"{task}: {error}. Give the folder that holds {name}.jsonl, data=DIR") from None
    reading = foreign(f"{task}: cannot read {member} of {path}", TextError)
    with reading, ZipFile(path) as archive, archive.open(member) as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise TextError(f"{task}: {member} of {path} has more than the {MAX_BYTES // 2**20} MiB that are read of it")
    return rows_in(f"{member} of {REPOSITORY}", content)
