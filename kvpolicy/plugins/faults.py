"""What code of a plugin throws becomes one error that says whose it is.

Whatever it throws: an exit (`SystemExit`) too, which would end the process as if all were well. Ctrl-C goes through.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from kvpolicy.errors import BudgetError, KVPolicyError, PluginError


class PluginFault(PluginError):
    """A fault in the code of a plugin, told with whose it is: it passes through the plugins that called that one."""


@contextmanager
def contained(whose: str) -> Iterator[None]:
    """Around code of a plugin. `whose` begins the message, such as "policy 'x' of acme 1.2".

    Raises `PluginFault` for whatever the code throws, but for `KeyboardInterrupt` and errors that are the core's.
    """
    try:
        yield
    except BaseException as error:
        if not is_plugins(error):
            raise
        raise PluginFault(f"{whose}: {describe(error)}") from error


def is_plugins(error: BaseException) -> bool:
    """Whether an error that came out of a plugin is the plugin's; else it was told already, or is nobody's fault.

    A plugin raises `PluginError` to refuse, and meets `BudgetError` with values that cannot be. Our other errors
    come from what it was given, such as a probe whose model cannot be run, and say themselves whose they are.
    """
    if isinstance(error, PluginError | BudgetError):
        return not isinstance(error, PluginFault)
    return not isinstance(error, KVPolicyError | KeyboardInterrupt)


def describe(error: BaseException) -> str:
    """One line: the type of an exception and its message; of our own errors the message alone."""
    try:
        message = " ".join(str(error).split())
    except BaseException as unprintable:  # its __str__ is a plugin's, too
        if isinstance(unprintable, KeyboardInterrupt):
            raise
        message = ""
    if isinstance(error, KVPolicyError):
        return message
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def place(error: BaseException) -> str:
    """` (policy.py:12)`: where the function that was called went wrong; nothing where it was not reached."""
    frames = traceback.extract_tb(error.__traceback__)[1:2]
    return "".join(f" ({os.path.basename(frame.filename)}:{frame.lineno})" for frame in frames)
