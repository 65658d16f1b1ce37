"""Progress on standard error: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from kvpolicy.cli.terminal import Console, shell_line
from kvpolicy.progress import Progress


def watcher(quiet: bool) -> Progress:
    """What shows the progress of long work here."""
    if quiet:
        return Progress()
    console = Console(stderr=True)
    return _BarProgress(console) if console.is_terminal else _LineProgress(console)


class _BarProgress(Progress):
    def __init__(self, console: Console) -> None:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
        )
        self._console, self._columns = console, columns
        self._bars: Bars | None = None

    def note(self, message: str) -> None:
        self._console.print(shell_line(message))

    def begin(self, stage: str, total: int) -> None:
        self._bars = Bars(*self._columns, console=self._console)
        self._bars.add_task(stage, total=total, detail="")
        self._bars.start()

    def advance(self, detail: str = "") -> None:
        if self._bars is not None:
            self._bars.update(self._bars.task_ids[0], advance=1, detail=detail)

    def end(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None


class _LineProgress(Progress):
    """A line when a stage starts and ends, and one for each step that says something."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stage, self._begun = "", 0.0

    def note(self, message: str) -> None:
        self._console.print(shell_line(message), soft_wrap=True)

    def begin(self, stage: str, total: int) -> None:
        self._stage, self._begun = stage, time.monotonic()

    def advance(self, detail: str = "") -> None:
        if detail:
            self.note(f"{self._stage}: {detail} ({time.monotonic() - self._begun:.0f} s)")

    def end(self) -> None:
        self._stage = ""
