"""Names of estimators, allocators, policies and tasks: who offers them, and which one a name means.

Nothing happens at import; plugins are discovered when a name is first looked up.
"""

from __future__ import annotations

import pkgutil
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from importlib.metadata import entry_points as installed_entry_points
from typing import Any, Literal, cast, overload

from kvpolicy.errors import PluginConflictError, PluginError, PluginWarning
from kvpolicy.plugins.checks import BASES, build, class_problems, did_you_mean, quoted
from kvpolicy.plugins.discovery import Plugin, load_plugins, normalized
from kvpolicy.plugins.faults import contained
from kvpolicy.plugins.hookspecs import PROJECT, Registration, Role
from kvpolicy.plugins.roles import BudgetAllocator, EvictionPolicy, ImportanceEstimator
from kvpolicy.plugins.task_role import Task


@dataclass(frozen=True, slots=True)
class PluginRow:
    """One line of `kvpolicy plugins`.

    role:   "estimator", "allocator", "policy" or "task"; "" where a whole plugin is broken or disabled
    name:   the short name; where role is "", the entry point's, or the function that is no hook
    status: "ok"; "shadowed" or "conflict": only `distribution:name` reaches it; "replaced": a built-in whose
            name a plugin took over; "broken"; "disabled": left out by KVPOLICY_PLUGINS
    error:  why it is not "ok", else None
    """

    role: str
    name: str
    distribution: str
    version: str
    status: str
    error: str | None
    summary: str
    paper: str
    when: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class _Entry:
    offer: Registration
    plugin: Plugin

    @property
    def qualified(self) -> str:
        return f"{self.plugin.distribution}:{self.offer.name}"

    @property
    def whose(self) -> str:
        return f"{self.offer.role} '{self.offer.name}' of {self.plugin.owner}"


class Registry:
    """Finds plugin classes by role and name.

    A name is the short one ("streaming") or the qualified one ("kvpolicy:streaming"), which always works. Where
    kvpolicy and another distribution offer one short name, kvpolicy's own is meant, unless the other registered
    with `replace=True`; where two other distributions do, the short name is an error.

    entry_points: where plugins come from; the default is the group "kvpolicy" of the installed distributions.
    """

    def __init__(self, entry_points: Callable[[], Iterable[EntryPoint]] | None = None) -> None:
        self._entry_points = entry_points or _installed
        self._lock = threading.RLock()
        self._is_discovering = False
        self._plugins: list[Plugin] | None = None
        self._all: dict[Role, list[_Entry]] = {}
        self._named: dict[tuple[Role, str], list[_Entry]] = {}
        self._classes: dict[_Entry, type] = {}

    @overload
    def get(self, role: Literal["estimator"], name: str) -> type[ImportanceEstimator]: ...
    @overload
    def get(self, role: Literal["allocator"], name: str) -> type[BudgetAllocator]: ...
    @overload
    def get(self, role: Literal["policy"], name: str) -> type[EvictionPolicy]: ...
    @overload
    def get(self, role: Literal["task"], name: str) -> type[Task]: ...
    def get(self, role: Role, name: str) -> type:
        """The class behind a name; imports it at first use.

        Raises `PluginConflictError` for a short name of two owners, `PluginError` for an unknown name and for a
        target that cannot be imported or does not fill its role.
        """
        return self._class(self._find(role, name))

    @overload
    def create(
        self, role: Literal["estimator"], name: str, params: Mapping[str, Any] | None = None
    ) -> ImportanceEstimator: ...
    @overload
    def create(
        self, role: Literal["allocator"], name: str, params: Mapping[str, Any] | None = None
    ) -> BudgetAllocator: ...
    @overload
    def create(self, role: Literal["policy"], name: str, params: Mapping[str, Any] | None = None) -> EvictionPolicy: ...
    @overload
    def create(self, role: Literal["task"], name: str, params: Mapping[str, Any] | None = None) -> Task: ...
    def create(self, role: Role, name: str, params: Mapping[str, Any] | None = None) -> object:
        """An instance with the given parameters, as they stand in a plan; others keep their defaults.

        Raises as `get`, and `PluginError` for unknown parameters and wrong values, with all fields listed.
        """
        entry = self._find(role, name)
        return build(role, self._class(entry), params or {}, entry.whose)

    def names(self, role: Role) -> list[str]:
        """Every name that works in a role, sorted: short, or qualified where the short one means another's."""
        return sorted(
            entry.offer.name if self._standing(entry)[0] == "ok" else entry.qualified for entry in self._entries(role)
        )

    def whose(self, plugin: object) -> str:
        """Whose an object or a class is, for messages: "policy 'x' of acme 1.2", or its address if nobody offers it."""
        cls = plugin if isinstance(plugin, type) else type(plugin)
        with suppress(PluginError, PluginWarning):
            self._discovered()
        for entry in (entry for entries in self._all.values() for entry in entries):
            if cls in (entry.offer.target, self._classes.get(entry)) or _address(cls) == entry.offer.target:
                return entry.whose
        role = next((role for role, base in BASES.items() if issubclass(cls, base)), "plugin")
        return f"{role} {_address(cls)}, which is not registered"

    def rows(self) -> list[PluginRow]:
        """All that is registered and all that is broken. Imports the targets of other distributions, so that "ok" means
        usable; kvpolicy's own are held by its tests, and a list of them needs no torch.
        """
        rows = [self._entry_row(entry) for role in BASES for entry in self._entries(role)]
        for plugin in self._discovered():
            failures = dict(plugin.unknown) if plugin.status == "ok" else {plugin.name: plugin.error}
            status = "broken" if plugin.status == "ok" else plugin.status
            rows += [
                PluginRow("", name, plugin.distribution, plugin.version, status, error, "", "")
                for name, error in failures.items()
            ]
        return rows

    def _entry_row(self, entry: _Entry) -> PluginRow:
        status, error = self._standing(entry)
        offer, plugin = entry.offer, entry.plugin
        if not plugin.is_builtin:
            try:
                self._class(entry)
            except PluginError as failure:
                status, error = "broken", str(failure)
        about = {"summary": offer.summary, "paper": offer.paper, "when": offer.when}
        return PluginRow(offer.role, offer.name, plugin.distribution, plugin.version, status, error, **about)

    def _discovered(self) -> list[Plugin]:
        with self._lock:
            if self._plugins is not None:
                return self._plugins
            if self._is_discovering:
                raise PluginError("the registry was asked for a name while plugins register; ask for it later")
            self._is_discovering = True
            try:
                self._plugins, messages = load_plugins(self._entry_points())
            finally:
                self._is_discovering = False
            self._all, self._named = {}, {}
            for entry in (_Entry(offer, plugin) for plugin in self._plugins for offer in plugin.offers):
                self._all.setdefault(entry.offer.role, []).append(entry)
                self._named.setdefault((entry.offer.role, entry.offer.name), []).append(entry)
        for message in messages:
            warnings.warn(message, PluginWarning, stacklevel=2)
        return self._plugins

    def _entries(self, role: Role) -> list[_Entry]:
        if role not in BASES:
            raise PluginError(f"there is no role {role!r}; the roles are {quoted(BASES)}")
        self._discovered()
        return self._all.get(role, [])

    def _find(self, role: Role, name: str) -> _Entry:
        entries = self._entries(role)
        if not isinstance(name, str):
            raise PluginError(f"expected the name of a {role} or a kvpolicy.{BASES[role].__name__}, got {name!r}")
        distribution, _, short = name.rpartition(":")
        named = self._named.get((role, short), [])
        if distribution:
            named = [e for e in named if normalized(e.plugin.distribution) == normalized(distribution)]
        contenders = named if distribution else _contenders(named)
        if not contenders:
            raise PluginError(self._unknown(role, name, entries))
        if len(contenders) > 1:
            raise PluginConflictError(
                f"{role} '{name}' is offered by more than one distribution; say which: "
                f"{quoted(sorted(entry.qualified for entry in contenders))}"
            )
        return contenders[0]

    def _unknown(self, role: Role, name: str, entries: list[_Entry]) -> str:
        known = {entry.offer.name for entry in entries} | {entry.qualified for entry in entries if ":" in name}
        broken = sorted({p.distribution for p in self._discovered() if p.status != "ok"})
        return (
            f"there is no {role} named '{name}'{did_you_mean(name, known)}; there is "
            f"{quoted(self.names(role)) or f'none: is {PROJECT} installed (pip install -e .)?'}"
            f"{f'; broken or disabled: {quoted(broken)}' if broken else ''}. `kvpolicy plugins` shows all"
        )

    def _standing(self, entry: _Entry) -> tuple[str, str | None]:
        """The status of an entry among the others of its name, and why."""
        contenders = _contenders(self._named[entry.offer.role, entry.offer.name])
        others = quoted(sorted(other.qualified for other in contenders if other is not entry))
        use = f"use '{entry.qualified}'"
        if entry in contenders:
            return ("conflict", f"{others} has the same name; {use}") if others else ("ok", None)
        if entry.plugin.is_builtin:
            return "replaced", f"{others} took the name with replace=True; {use}"
        return "shadowed", f"{others} goes first; {use}, or register with replace=True"

    def _class(self, entry: _Entry) -> type:
        if entry not in self._classes:
            self._classes[entry] = _import(entry)
        return self._classes[entry]


def _installed() -> Iterable[EntryPoint]:
    return installed_entry_points(group=PROJECT)


def _address(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _contenders(named: list[_Entry]) -> list[_Entry]:
    """Those a short name can mean: kvpolicy's own, or what replaces it, or all where kvpolicy offers none."""
    builtin = [entry for entry in named if entry.plugin.is_builtin]
    replacing = [entry for entry in named if entry.offer.replace and not entry.plugin.is_builtin]
    return (replacing or builtin) if builtin else named


def _import(entry: _Entry) -> type:
    target = entry.offer.target
    if isinstance(target, str):
        with contained(f"{entry.whose}: cannot import '{target}'"):
            target = pkgutil.resolve_name(target)
    with contained(entry.whose):
        problems = class_problems(entry.offer.role, target)
    if problems:
        raise PluginError(f"{entry.whose} cannot be used: {'; '.join(problems)}")
    return cast(type, target)


registry = Registry()
"""The registry of the installed plugins. Does nothing until it is first asked for a name."""
