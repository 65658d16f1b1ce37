"""Loads plugins one by one, so that a broken one costs one warning and nothing else.

`pluggy.PluginManager.load_setuptools_entrypoints` is not used: one ImportError there takes every plugin down.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint

import pluggy

from kvpolicy.errors import PluginError
from kvpolicy.plugins import hookspecs
from kvpolicy.plugins.checks import quoted
from kvpolicy.plugins.faults import describe
from kvpolicy.plugins.hookspecs import PROJECT, Register, Registration, Role

ALLOW_VARIABLE = "KVPOLICY_PLUGINS"
"""Environment variable: comma-separated distributions whose plugins are loaded; unset means all."""

_Taken = dict[tuple[str, Role, str], str]  # distribution, role, name -> the entry point that offers it


@dataclass(slots=True)
class Plugin:
    """One entry point: who it belongs to, what it offers, and what went wrong.

    status:  "ok", "broken" (nothing of it is used) or "disabled" (left out by `KVPOLICY_PLUGINS`)
    error:   why it is not "ok"
    unknown: functions that look like hooks and are none; the rest of the plugin works
    """

    name: str
    distribution: str
    version: str
    status: str = "ok"
    error: str = ""
    unknown: dict[str, str] = field(default_factory=dict)
    offers: list[Registration] = field(default_factory=list)

    @property
    def is_builtin(self) -> bool:
        return normalized(self.distribution) == PROJECT

    @property
    def owner(self) -> str:
        return f"{self.distribution} {self.version}"

    def leave_out(self, status: str, error: str) -> None:
        self.status, self.error = status, error

    def offer(self, registrations: Iterable[Registration], unknown: dict[str, str]) -> None:
        self.offers, self.unknown = list(registrations), unknown


def normalized(distribution: str) -> str:
    """The name as package indexes compare it: `My_Plugin` and `my-plugin` are one."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def load_plugins(entry_points: Iterable[EntryPoint]) -> tuple[list[Plugin], list[str]]:
    """All plugins, built-ins first, and one warning for each that is broken. Never raises for a plugin."""
    allowed = _allowed()
    plugins: list[Plugin] = []
    taken: _Taken = {}
    entries = [(_describe_entry(entry), entry) for entry in entry_points]
    for plugin, entry in sorted(entries, key=lambda pair: (not pair[0].is_builtin, pair[0].distribution, pair[0].name)):
        if plugin.is_builtin or allowed is None or normalized(plugin.distribution) in allowed:
            _load(plugin, entry, taken)
        else:
            plugin.leave_out("disabled", f"{ALLOW_VARIABLE} does not name '{plugin.distribution}'")
        plugins.append(plugin)
    return plugins, [*_absent(allowed, plugins), *filter(None, map(_warning, plugins))]


def _allowed() -> set[str] | None:
    value = os.environ.get(ALLOW_VARIABLE)
    return None if value is None else {normalized(name.strip()) for name in value.split(",") if name.strip()}


def _describe_entry(entry: EntryPoint) -> Plugin:
    owner = entry.dist
    return Plugin(entry.name, owner.name if owner else "unknown", owner.version if owner else "0")


def _load(plugin: Plugin, entry: EntryPoint, taken: _Taken) -> None:
    try:
        module = entry.load()
        # A manager of its own: a plugin is called alone, and one that fails leaves nothing in the others'.
        manager = pluggy.PluginManager(PROJECT)
        manager.add_hookspecs(hookspecs)
        manager.register(module, plugin.name)
        register = Register()
        manager.hook.kvpolicy_register(register=register)
        unknown = _unknown_hooks(manager, module)
        if not register.offers:
            nothing = "it registers nothing: implement kvpolicy_register(register)"
            raise PluginError("; ".join(unknown.values()) or nothing)
        _take(plugin, register, taken)
        plugin.offer(register.offers.values(), unknown)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # an exit too: it would take the others down
        plugin.leave_out("broken", describe(error))


def _take(plugin: Plugin, register: Register, taken: _Taken) -> None:
    """Takes the names of a plugin, all or none."""
    names = {(normalized(plugin.distribution), *offered): plugin.name for offered in register.offers}
    for name in names.keys() & taken.keys():
        _, role, short = name
        raise PluginError(f"{role} '{short}' is already offered by entry point '{taken[name]}'")
    taken.update(names)


def _unknown_hooks(manager: pluggy.PluginManager, module: object) -> dict[str, str]:
    """Functions that were meant as hooks and are never called, each with the reason. pluggy ignores them."""
    problems = {}
    for name in dir(module):
        options = manager.parse_hookimpl_opts(module, name)
        hook = (options and options["specname"]) or name
        is_spec = hasattr(hookspecs, hook) and hook.startswith(f"{PROJECT}_")
        looks_like_one = name.startswith(f"{PROJECT}_") and inspect.isroutine(getattr(module, name, None))
        if options is None and is_spec and looks_like_one:
            problems[name] = f"{name} is not marked: decorate it with @kvpolicy.hookimpl"
        elif not is_spec and ((options and not options["optionalhook"]) or looks_like_one):
            problems[name] = f"{name} is no hook of this kvpolicy, which has 'kvpolicy_register', and is never called"
    return problems


def _absent(allowed: set[str] | None, plugins: list[Plugin]) -> list[str]:
    present = {normalized(plugin.distribution) for plugin in plugins}
    absent = sorted((allowed or set()) - present)
    return [f"{ALLOW_VARIABLE} names {quoted(absent)}, which offers no kvpolicy plugin here"] if absent else []


def _warning(plugin: Plugin) -> str | None:
    whose = f"plugin '{plugin.name}' of distribution '{plugin.distribution}' {plugin.version}"
    if plugin.status == "broken":
        return f"{whose} is left out: {plugin.error}. Everything else works; `kvpolicy plugins` shows what is broken"
    return f"{whose}: {'; '.join(plugin.unknown.values())}" if plugin.unknown else None
