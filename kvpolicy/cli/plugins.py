"""`kvpolicy plugins`: what is registered, by whom, what is broken and why."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from typing import TYPE_CHECKING

from kvpolicy.cli import options as opt
from kvpolicy.errors import PluginWarning

if TYPE_CHECKING:
    from rich.text import Text

    from kvpolicy.plugins.registry import PluginRow
    from kvpolicy.report.grid import Grid

_ABOUT = "what it does, when to use it"
_HEADINGS = {
    "estimator": "importance estimators",
    "allocator": "budget allocators",
    "policy": "eviction policies",
    "task": "tasks",
    "": "left out",
}


def plugins(config: opt.Config = None, json: opt.Json = False) -> None:
    """List every estimator, allocator, policy and task, when to use it, and what is wrong with broken ones."""
    from kvpolicy.plugins.registry import registry

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PluginWarning)  # the rows say it
        rows = registry.rows()
    if json:
        opt.print_json([asdict(row) for row in rows])
        return
    from kvpolicy.cli.terminal import Console

    console = Console()
    for role in dict.fromkeys(row.role for row in rows):
        console.print(_table(role, [row for row in rows if row.role == role]))


def _table(role: str, rows: list[PluginRow]) -> Grid:
    """The rows of a role. Where all are of one distribution, or ok, the heading says it for all of them."""
    from rich.text import Text

    from kvpolicy.report.grid import Grid

    owners = [f"{row.distribution} {row.version}" for row in rows]
    columns: dict[str, list[str | Text]] = {"name": [row.name for row in rows]}
    title = _HEADINGS[role]
    if len({*owners}) == 1:
        title += f" of {owners[0]}"
    else:
        columns["from"] = [*owners]
    if any(row.status != "ok" for row in rows):
        columns["status"] = [Text(row.status, style="" if row.status == "ok" else "red") for row in rows]
    columns[_ABOUT] = [_about(row) for row in rows]
    return Grid([*columns], zip(*columns.values(), strict=True), title=title, words=[_ABOUT])


def _about(row: PluginRow) -> Text:
    from rich.text import Text

    text = Text(row.error or row.summary)
    return text.append(f" {row.when}", style="dim") if row.when and not row.error else text
