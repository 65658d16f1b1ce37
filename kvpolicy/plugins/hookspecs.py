"""The one hook of kvpolicy, and what a plugin is given to register with."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import pluggy

from kvpolicy.errors import PluginError
from kvpolicy.plugins.roles import BudgetAllocator, EvictionPolicy, ImportanceEstimator
from kvpolicy.plugins.task_role import Task

PROJECT = "kvpolicy"
"""Name of the entry-point group, of the pluggy project, and of the distribution that carries the built-in sets."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks a plugin's implementation of `kvpolicy_register`."""

Role = Literal["estimator", "allocator", "policy", "task"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")  # no ':', which separates the distribution from the name


@dataclass(frozen=True, slots=True)
class Registration:
    """One offer of a plugin; `target` is "pkg.mod:Class", imported at first use, or the class itself."""

    role: Role
    name: str
    target: str | type
    summary: str
    paper: str
    when: str
    replace: bool


class Register:
    """Collects what one plugin offers. Nothing is known to others until the plugin's hook has returned.

    The four methods take the short name users write (lower_snake by convention), and the class, or better its
    address "pkg.mod:Class": an address is imported when the name is first used, so that a plugin costs nothing
    until then.

    summary: one line for `kvpolicy plugins`;  paper: where the method is from ("arXiv:2502.13176")
    when: one line on when to use it, for whoever has to choose
    replace: True to take over a name that kvpolicy itself offers; without it kvpolicy's own stays

    Raises `PluginError` for a malformed name or target, and for a name given twice in one role.
    """

    def __init__(self) -> None:
        self.offers: dict[tuple[Role, str], Registration] = {}

    def estimator(
        self,
        name: str,
        target: str | type[ImportanceEstimator],
        *,
        summary: str = "",
        paper: str = "",
        when: str = "",
        replace: bool = False,
    ) -> None:
        """Offers an importance estimator."""
        self._add(Registration("estimator", name, target, summary, paper, when, replace))

    def allocator(
        self,
        name: str,
        target: str | type[BudgetAllocator],
        *,
        summary: str = "",
        paper: str = "",
        when: str = "",
        replace: bool = False,
    ) -> None:
        """Offers a budget allocator."""
        self._add(Registration("allocator", name, target, summary, paper, when, replace))

    def policy(
        self,
        name: str,
        target: str | type[EvictionPolicy],
        *,
        summary: str = "",
        paper: str = "",
        when: str = "",
        replace: bool = False,
    ) -> None:
        """Offers an eviction policy."""
        self._add(Registration("policy", name, target, summary, paper, when, replace))

    def task(
        self,
        name: str,
        target: str | type[Task],
        *,
        summary: str = "",
        paper: str = "",
        when: str = "",
        replace: bool = False,
    ) -> None:
        """Offers a task, or a family of tasks: `name/MEMBER` is the one whose field `name` is MEMBER."""
        self._add(Registration("task", name, target, summary, paper, when, replace))

    def _add(self, offer: Registration) -> None:
        if not isinstance(offer.name, str) or not _NAME.fullmatch(offer.name):
            raise PluginError(
                f"{offer.role} name {offer.name!r} is not allowed: use letters, digits, '_', '-' and '.', "
                "starting with a letter or digit, such as 'value_norm'"
            )
        if isinstance(offer.target, str) and not all(offer.target.partition(":")):
            raise PluginError(
                f"{offer.role} '{offer.name}' has the target '{offer.target}'; expected 'package.module:Class'"
            )
        if (offer.role, offer.name) in self.offers:
            raise PluginError(f"{offer.role} '{offer.name}' is registered twice by one plugin; give each its own name")
        self.offers[offer.role, offer.name] = offer


@hookspec
def kvpolicy_register(register: Register) -> None:
    """Offers what a plugin has; called once for each plugin, when a name is first looked up."""
