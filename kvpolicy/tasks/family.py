"""Names of tasks: `FAMILY/NAME` is the task `FAMILY` whose field `name` is NAME."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

from kvpolicy.errors import PluginError
from kvpolicy.plugins.checks import did_you_mean, quoted
from kvpolicy.plugins.registry import registry
from kvpolicy.plugins.task_role import Task


def task_of(name: str, params: Mapping[str, Any] | None = None) -> Task:
    """The task of a name such as "passkey" or "ruler/vt", with these fields. Raises `PluginError`.

    params: without the member's name; `data` is refused for a task that reads no files
    """
    family, slash, member = name.partition("/")
    cls = registry.get("task", family)
    if cls.names and not slash:
        raise PluginError(f"'{name}' is a family of tasks: name one of them, such as {name}/{cls.names[0]}")
    if slash and not cls.names:
        raise PluginError(f"'{family}' is one task, not a family: leave '/{member}' out")
    if "data" in (params or {}) and "data" not in {field.name for field in fields(cls)}:  # type: ignore[arg-type]
        raise PluginError(f"the task {name} reads no files: leave the folder of its data out")
    return registry.create("task", family, {**({"name": member} if slash else {}), **(params or {})})


def task_names() -> list[str]:
    """Every name that `task_of` takes without files of one's own, sorted."""
    names = []
    for family in registry.names("task"):
        members = registry.get("task", family).names
        names += [f"{family}/{member}" for member in members] or [family]
    return sorted(names)


def families() -> list[str]:
    """The names of tasks, single ones first; a family stands as `ruler/NAME`."""
    names = [name for name in registry.names("task") if name != "file"]  # which is asked for by its file
    single = [name for name in names if not registry.get("task", name).names]
    return [*single, *(f"{name}/NAME" for name in names if name not in single)]


def check_member(family: str, name: str, names: Collection[str]) -> None:
    """Raises `PluginError` for a name that a family of tasks does not have."""
    if name not in names:
        raise PluginError(f"there is no task '{family}/{name}'{did_you_mean(name, names)}; there is {quoted(names)}")
