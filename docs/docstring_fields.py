"""Griffe extension: lines of a docstring that say what a parameter or a field is become a Markdown list.

    name:  text
    other: text that goes on
        in an indented line

Only names that the object has count, so that prose with a colon stays prose.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_FIELD = re.compile(r"([a-z_]\w*(?:, [a-z_]\w*)*):\s+(.*)")


class DocstringFields(griffe.Extension):
    """Rewrites every docstring of a package once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Called by griffe."""
        _visit(pkg)


def _visit(owner: griffe.Object) -> None:
    for member in owner.members.values():
        if isinstance(member, griffe.Alias):
            continue
        if member.docstring is not None:
            member.docstring.value = as_list(member.docstring.value, _names(member))
        _visit(member)


def _names(member: griffe.Object) -> set[str]:
    if isinstance(member, griffe.Function):
        return {parameter.name for parameter in member.parameters}
    init = member.all_members.get("__init__") if isinstance(member, griffe.Class) else None
    own = {parameter.name for parameter in init.parameters} if init is not None and init.is_function else set()
    return own | set(member.members)


def as_list(text: str, names: set[str]) -> str:
    """The docstring with each run of field lines as a list; other lines are left alone."""
    lines: list[str] = []
    is_open = False
    for line in text.splitlines():
        found = _FIELD.fullmatch(line)
        if found and set(found[1].split(", ")) <= names:
            if not is_open:
                lines.append("")
            is_open = True
            labels = ", ".join(f"`{name}`" for name in found[1].split(", "))
            lines.append(f"- {labels}: {found[2]}")
        elif is_open and line.startswith(" "):
            lines.append(f"    {line.strip()}")
        else:
            if is_open and line:
                lines.append("")
            is_open = False
            lines.append(line)
    return "\n".join(lines)
