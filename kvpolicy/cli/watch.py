"""Progress on standard error: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as Bars
from rich.text import Text

from kvpolicy.cli.terminal import Console, shell_line
from kvpolicy.progress import Progress


def watcher(quiet: bool) -> Progress:
    """What shows the progress of long work here."""
    if quiet:
        return Progress()
    console = Console(stderr=True)
    return _BarProgress(console) if console.is_terminal else _LineProgress(console)


def turning(message: str) -> AbstractContextManager[object]:
    """A line that turns while a few seconds pass, for whoever watches; nothing elsewhere."""
    console = Console(stderr=True)
    return console.status(shell_line(message)) if console.is_terminal else nullcontext()


_SILENCE = 60  # seconds, after which a line says how far a stage is
_SPAN = 600  # seconds; what is left is estimated from the steps of the last ones


def duration(seconds: float) -> str:
    """A time as people say it: `25 s`, `4 min`, `1 h 20 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


class _Times(ProgressColumn):
    """How long a stage has taken, and about how long the rest takes once a step says so."""

    def render(self, task: Task) -> Text:
        taken = duration(task.finished_time or task.elapsed or 0.0)
        left = "" if task.finished or task.time_remaining is None else f", {duration(task.time_remaining)} left"
        return Text(taken + left, style="progress.elapsed")


class _BarProgress(Progress):
    def __init__(self, console: Console) -> None:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=16),  # with the rest it fits 80 characters
            MofNCompleteColumn(),
            _Times(),
            TextColumn("{task.fields[detail]}", markup=False),
        )
        self._console, self._columns = console, columns
        self._bars: Bars | None = None

    def note(self, message: str) -> None:
        self._console.print(shell_line(message))

    @contextmanager
    def wait(self, message: str) -> Iterator[None]:
        with self._console.status(shell_line(message)):
            yield

    def begin(self, stage: str, total: int) -> None:
        self._bars = Bars(*self._columns, console=self._console, speed_estimate_period=_SPAN)
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
    """A line for each step that says something, and one a minute where none does."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stage, self._begun, self._said = "", 0.0, 0.0
        self._total = self._done = 0

    def note(self, message: str) -> None:
        self._console.print(shell_line(message), soft_wrap=True)

    def begin(self, stage: str, total: int) -> None:
        self._stage, self._total, self._done = stage, total, 0
        self._begun = self._said = time.monotonic()

    def advance(self, detail: str = "") -> None:
        self._done += 1
        now = time.monotonic()
        if not detail and self._done < self._total and now - self._said > _SILENCE:
            left = (now - self._begun) / self._done * (self._total - self._done)
            detail = f"{self._done} of {self._total}, about {duration(left)} left"
        if detail:
            self._said = now
            self.note(f"{self._stage}: {detail} ({now - self._begun:.0f} s)")

    def end(self) -> None:
        self._stage = ""
