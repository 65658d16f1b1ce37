"""With --json standard output is one JSON document, whatever else is printed while the verb runs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from typing import Any

import typer

_DOCUMENT: ContextVar[list[str] | None] = ContextVar("_DOCUMENT", default=None)  # of the verb that runs


def reserve(context: typer.Context, value: bool) -> bool:
    """The callback of --json: until the verb ends standard output is standard error, then it is the document's."""
    if value:
        context.with_resource(_reserved())
    return value


def print_json(value: Any) -> None:
    """What the verb says, as JSON."""
    text, document = json.dumps(value, indent=2, allow_nan=False) + "\n", _DOCUMENT.get()
    if document is None:
        sys.stdout.write(text)
    else:
        document.append(text)


@contextmanager
def _reserved() -> Iterator[None]:
    document: list[str] = []
    token = _DOCUMENT.set(document)
    try:
        with _aside():
            yield
    finally:
        _DOCUMENT.reset(token)
    sys.stdout.write("".join(document))


@contextmanager
def _aside() -> Iterator[None]:
    """Sends to standard error what is printed, be it by Python, by C or by a child process."""
    out, err = sys.stdout, sys.stderr
    out.flush()
    try:
        into, instead = out.fileno(), err.fileno()
    except (AttributeError, OSError, ValueError):  # no files: a notebook, a test, a process without standard error
        with redirect_stdout(err):
            yield
        return
    kept = os.dup(into)
    os.dup2(instead, into)
    try:
        with redirect_stdout(err):
            yield
    finally:
        out.flush()  # what somebody wrote who holds the stream itself
        os.dup2(kept, into)
        os.close(kept)
