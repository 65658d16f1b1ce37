"""Reading a task's rows from a local JSONL file: every complaint names the file, the line and the field."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvpolicy.errors import KVPolicyError, TextError
from kvpolicy.files.fields import describe
from kvpolicy.files.regular import read_bytes
from kvpolicy.plugins.task_role import Sample
from kvpolicy.tasks.fitting import drawer

MAX_BYTES = 512 * 2**20
"""Of one file."""


@dataclass(frozen=True, slots=True)
class Row:
    """One JSON object of a file. Methods raise `TextError` for a field that is missing or of another kind.

    place: file and line, for messages
    """

    place: str
    value: dict[str, Any]

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.value.get(name) is not None

    def text(self, name: str) -> str:
        value = self._field(name)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise self.refusal(f"'{name}' is {describe(value)}, expected a text")
        return str(value)

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of texts, or one text; at least one."""
        value = self._field(name)
        parts = value if isinstance(value, list) else [value]
        wrong = [part for part in parts if isinstance(part, bool) or not isinstance(part, str | int | float)]
        if wrong or not parts:
            raise self.refusal(f"'{name}' is {describe((wrong or [value])[0])}, expected texts, one at least")
        return tuple(map(str, parts))

    def objects(self, name: str) -> list[Row]:
        """A list of objects, at least one."""
        value = self._field(name)
        if not isinstance(value, list) or not value or not all(isinstance(part, dict) for part in value):
            raise self.refusal(f"'{name}' is {describe(value)}, expected a list of objects, one at least")
        return [Row(f"{self.place}, {name}[{index}]", part) for index, part in enumerate(value)]

    def refusal(self, what: str) -> TextError:
        return TextError(f"{self.place}: {what}")

    def _field(self, name: str) -> Any:
        if not self.has(name):
            raise self.refusal(f"'{name}' is missing; the object has {', '.join(map(str, self.value)) or 'nothing'}")
        return self.value[name]


def read_rows(path: str | os.PathLike[str]) -> list[Row]:
    """The objects of a JSONL file, empty lines left out. Raises `TextError` naming the file, and the line."""
    return rows_in(str(path), _content(path))


def rows_in(place: str, content: bytes) -> list[Row]:
    """The objects of the content of a JSONL file, as `read_rows` reads it. place: its name, for messages"""
    rows = [Row(f"{place}, line {number}", _parsed(place, number, line)) for number, line in _lines(place, content)]
    if not rows:
        raise TextError(f"{place} has no rows, expected a JSON object on every line")
    return rows


def read_json(path: str | os.PathLike[str]) -> Row:
    """The object of a JSON file. Raises as `read_rows` does."""
    text = "\n".join(line for _, line in _lines(str(path), _content(path)))
    return Row(str(path), _parsed(str(path), 1, text))


def drawn_rows(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """`count` rows drawn without repeats, in the order of the file; all of them where there are no more."""
    places = sorted(drawer(seed, 0).sample(range(len(rows)), min(count, len(rows))))
    return [rows[place] for place in places]


def data_file(task: str, folder: str, name: str) -> Path:
    """The path of a task's file in its `--data` folder. Raises `TextError` without a folder and without the file."""
    if not folder:
        raise TextError(f"{task} reads {name}: give the folder that holds it, data=DIR")
    path = Path(folder) / name
    if not path.exists():
        raise TextError(f"{task} reads {path}, and there is no such file")
    return path


def fitting_sample(row: Row, sample: Sample, length: int) -> Sample:
    """The sample of a row. Raises `TextError` for one that is longer than `length`."""
    if sample.length > length:
        raise row.refusal(f"the prompt has {sample.length} tokens, more than the {length} that were asked for")
    return sample


def _content(path: str | os.PathLike[str]) -> bytes:
    try:
        return read_bytes(path, MAX_BYTES)
    except KVPolicyError as error:
        raise TextError(f"cannot read {path}: {error}") from None


def _lines(place: str, content: bytes) -> Iterator[tuple[int, str]]:
    """The lines that are not empty, each with its number."""
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise TextError(f"{place}, line {number}: byte {error.start} is not UTF-8 text") from None
        if text.strip():
            yield number, text


def _parsed(place: str, number: int, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", None) or "nested too deep, or a number too long"
        raise TextError(f"{place}, line {number}: no complete JSON ({reason})") from None
    if not isinstance(value, dict):
        raise TextError(f"{place}, line {number}: {describe(value)}, expected an object")
    return value
