"""The error family. Every message says what came, what was expected, whose it is, and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class KVPolicyError(Exception):
    """Root of all errors raised on purpose by kvpolicy; the command line turns them into exit code 2."""


class BudgetError(KVPolicyError):
    """A budget, a capacity table or shares that cannot be honoured."""


class PlanError(KVPolicyError):
    """A plan file that is damaged, of another version, or made for another model."""


class ModelError(KVPolicyError):
    """A model that is not found, cannot be read, or whose attention cannot be reached."""


class AbsentModelError(ModelError):
    """The model that a plan names is not on this machine, and a plan may come from anybody.

    name: the model's;  reason: why it could not be loaded
    """

    def __init__(self, name: str, reason: ModelError) -> None:
        self.name, self.reason = name, reason
        super().__init__(self.message(f"model='{name}'"))

    def message(self, remedy: str) -> str:
        """The message. remedy: what starts the download"""
        return (
            f"the plan names the model '{self.name}', which is not on this machine, and a plan alone starts no "
            f"download. Name another with model=, or if you want this one: {remedy} ({self.reason})"
        )


class TextError(KVPolicyError):
    """Calibration text that is missing, unreadable or too short."""


class PluginError(KVPolicyError):
    """A plugin that is unknown, broken, or does not honour its role."""


class PluginConflictError(PluginError):
    """Two distributions offer one name in one role."""


class StudyError(KVPolicyError):
    """A search that cannot be started or resumed with the given settings."""


class PluginWarning(UserWarning):
    """A plugin was left out; everything else works."""


class ModelWarning(UserWarning):
    """A model's files are not as they were written; what could be made good was."""


class PlanWarning(UserWarning):
    """A plan is used outside the conditions it was made for."""


class VersionWarning(UserWarning):
    """A release of transformers that is newer than those kvpolicy was tested with."""


class FormatWarning(UserWarning):
    """Entries in a format of few bits lose more than it is known to lose."""


class GraphWarning(UserWarning):
    """Decoding is slower than it could be: a token cannot be a replay of a CUDA graph."""


@contextmanager
def foreign(attempt: str, kind: type[KVPolicyError]) -> Iterator[None]:
    """Around a call into a library that reads what is somebody's: whatever is raised there becomes one line of `kind`.

    attempt: what was tried with whose file, such as "cannot load the model 'x' from the directory x"

    Our own code stays outside: an error in it is a bug and is to be seen as one.
    """
    try:
        yield
    except (KVPolicyError, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # an exit, and a panic in Rust, are no `Exception`
        raise kind(f"{attempt}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """What an error of a library says, without the paragraphs behind it; with its type unless it was said to users."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    last = next((index for index, line in enumerate(lines) if not line.endswith(":")), len(lines) - 1)
    text = " ".join(lines[: last + 1])
    if isinstance(error, OSError | ValueError | RuntimeError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
