"""Losses that profiling asked for, in a file beside the plan, so that a profile which was cut off goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvpolicy.errors import StudyError
from kvpolicy.tuning.storage import repair_journal


class LossJournal:
    """A line of settings, then one for each table of capacities: its hash and the loss of each sequence.

    settings: what losses depend on beside the capacities; losses under others are not used
    resume:   use what is there; otherwise the first loss that is kept begins the file anew

    The file appears with the first loss. Raises `StudyError` where it cannot be read or written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, resume: bool) -> None:
        self._path = path
        self._settings = json.loads(json.dumps(settings))
        self._losses: dict[str, list[float]] = {}
        self._begun = resume and self._read()

    def find(self, capacities: Tensor) -> Tensor | None:
        """float64 `[num_sequences]`, or None for a table that was not asked for yet. capacities: int `[L, H]`."""
        losses = self._losses.get(_key(capacities))
        return None if losses is None else torch.tensor(losses, dtype=torch.float64)

    def keep(self, capacities: Tensor, losses: Tensor) -> None:
        """Writes the losses down at once. losses: `[num_sequences]`."""
        key = _key(capacities)
        self._losses[key] = losses.tolist()
        try:
            with self._path.open("a" if self._begun else "w", encoding="utf-8") as file:
                if not self._begun:
                    file.write(json.dumps(self._settings) + "\n")
                file.write(json.dumps({key: self._losses[key]}) + "\n")
        except OSError as error:
            raise StudyError(f"cannot write the losses of profiling to {self._path}: {error.strerror}") from error
        self._begun = True

    def _read(self) -> bool:
        """Whether there is a file of these settings; its losses are known then."""
        try:
            repair_journal(self._path)
            lines = self._path.read_text(encoding="utf-8").splitlines()
            if not lines or json.loads(lines[0]) != self._settings:  # empty: killed before the settings were written
                return False
            for line in lines[1:]:
                self._losses.update(json.loads(line))
        except FileNotFoundError:
            return False
        except (OSError, ValueError) as error:
            raise StudyError(
                f"cannot read the losses of an earlier profile in {self._path} ({error}): move the file away"
            ) from error
        return True


def _key(capacities: Tensor) -> str:
    return hashlib.sha256(json.dumps(capacities.tolist()).encode()).hexdigest()
