"""Losses that profiling asked for, in a file beside the plan, so that a profile which was cut off goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvpolicy.errors import KVPolicyError, StudyError
from kvpolicy.files.regular import read_bytes
from kvpolicy.tuning.storage import repair_journal

_MOST_BYTES = 2**30


class LossJournal:
    """A line of settings, then one for each table of capacities: its hash and the loss of each sequence; and so on,
    for each run that had losses to keep.

    path:     None keeps them in memory alone
    settings: what losses depend on beside the capacities; losses under others are not used
    resume:   use what is there

    The file appears with the first loss. Raises `StudyError` where it cannot be read or written.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any], *, resume: bool) -> None:
        self._path = path
        self._settings = json.loads(json.dumps(settings))
        self._losses: dict[str, list[float]] = {}
        self._has_settings = False
        if resume and path is not None:
            self._read(path)

    def find(self, capacities: Tensor) -> Tensor | None:
        """float64 `[num_sequences]`, or None for a table that was not asked for yet. capacities: int `[L, H]`."""
        losses = self._losses.get(_key(capacities))
        return None if losses is None else torch.tensor(losses, dtype=torch.float64)

    def keep(self, capacities: Tensor, losses: Tensor) -> None:
        """Writes the losses down at once. losses: `[num_sequences]`."""
        key = _key(capacities)
        self._losses[key] = losses.tolist()
        if self._path is None:
            return
        try:
            if not self._has_settings:
                repair_journal(self._path)
            with self._path.open("a", encoding="utf-8") as file:
                if not self._has_settings:
                    file.write(json.dumps(self._settings) + "\n")
                file.write(json.dumps({key: self._losses[key]}) + "\n")
        except OSError as error:
            raise StudyError(f"cannot write the losses of profiling to {self._path}: {error.strerror}") from error
        self._has_settings = True

    def _read(self, path: Path) -> None:
        """Takes what was kept under these settings."""
        if not path.exists():
            return
        is_ours = False
        try:
            repair_journal(path)
            for line in read_bytes(path, _MOST_BYTES).splitlines():
                entry = json.loads(line)
                if isinstance(entry, dict) and entry and all(isinstance(value, list) for value in entry.values()):
                    self._losses.update(entry if is_ours else {})
                else:
                    is_ours = entry == self._settings
        except (KVPolicyError, OSError, ValueError) as error:
            raise StudyError(
                f"cannot read the losses of an earlier profile in {path} ({error}): move the file away"
            ) from error


def _key(capacities: Tensor) -> str:
    return hashlib.sha256(json.dumps(capacities.tolist()).encode()).hexdigest()
