"""Names of tasks: `FAMILY/NAME` is the task `FAMILY` whose field `name` is NAME."""

from __future__ import annotations

from collections.abc import Collection

from kvpolicy.errors import PluginError
from kvpolicy.plugins.checks import did_you_mean, quoted


def check_member(family: str, name: str, names: Collection[str]) -> None:
    """Raises `PluginError` for a name that a family of tasks does not have."""
    if name not in names:
        raise PluginError(f"there is no task '{family}/{name}'{did_you_mean(name, names)}; there is {quoted(names)}")
