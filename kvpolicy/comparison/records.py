"""What every sample of a task gave, one line of JSON each, so that a run that was cut short goes on behind it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from kvpolicy.comparison.methods import Method
from kvpolicy.errors import KVPolicyError
from kvpolicy.files.regular import check_regular


class Records:
    """Lines of a file, found again by run, method, capacities and sample. Other runs' lines stay and do not count.

    path:     the file, which is made at the first record; None for records that are kept for this run alone
    settings: what must agree for a record to count, as JSON values
    facts:    what every record of this run says of it
    """

    def __init__(self, path: Path | None, settings: dict[str, Any], facts: Mapping[str, Any] | None = None) -> None:
        self.path, self._run, self.facts = path, _digest(settings), dict(facts or {})
        self._known: dict[str, dict[str, Any]] = {}
        if path is not None and path.exists():
            self._read(path)

    def find(self, method: Method, table: Tensor, index: int) -> dict[str, Any] | None:
        """The record of a sample, if there is one."""
        return self._known.get(self._key(method, table, index))

    def add(self, method: Method, table: Tensor, index: int, values: dict[str, Any]) -> dict[str, Any]:
        """Appends a record, and gives it. Raises `KVPolicyError` where the file cannot be written."""
        key = self._key(method, table, index)
        record = {"key": key, "method": method.name, "sample": index, **self.facts, **values}
        self._known[key] = record
        if self.path is not None:
            try:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(record, allow_nan=False) + "\n")
            except OSError as error:
                raise KVPolicyError(f"cannot write {self.path}: {error.strerror or error}") from None
        return record

    def _read(self, path: Path) -> None:
        try:
            check_regular(path)
            lines = path.read_bytes().split(b"\n")
        except (KVPolicyError, OSError) as error:
            raise KVPolicyError(f"cannot read {path}: {error}") from None
        for line in lines:
            try:
                record = json.loads(line)
                self._known[record["key"]] = record
            except (ValueError, KeyError, TypeError):  # the last line of a run that was cut short, or another's
                continue

    def _key(self, method: Method, table: Tensor, index: int) -> str:
        return _digest([self._run, method.identity, table.long().cpu().tolist(), index])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:24]
