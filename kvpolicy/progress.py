"""What long work tells whoever watches. The default says nothing; the command line draws bars."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Progress:
    """Called from one thread, in this order: notes at any time; begin, advance ..., end for each stage."""

    def note(self, message: str) -> None:
        """One line worth reading."""

    @contextmanager
    def wait(self, message: str) -> Iterator[None]:
        """Work of some seconds whose steps cannot be counted, such as loading a model."""
        self.note(message)
        yield

    def begin(self, stage: str, total: int) -> None:
        """A stage of `total` steps starts."""

    def advance(self, detail: str = "") -> None:
        """One step of the stage is done; `detail` is the newest figure, such as the best value so far."""

    def end(self) -> None:
        """The stage is over, also when it failed."""
