"""`kvpolicy plugins`: what is registered, by whom, what is broken and why."""

from __future__ import annotations

import warnings
from dataclasses import asdict

from kvpolicy.cli import options as opt
from kvpolicy.errors import PluginWarning


def plugins(json: opt.Json = False) -> None:
    """List every estimator, allocator, policy and task, when to use it, and what is wrong with broken ones."""
    from kvpolicy.plugins.registry import registry

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PluginWarning)  # the rows say it
        rows = registry.rows()
    if json:
        opt.print_json([asdict(row) for row in rows])
        return
    from rich.table import Table
    from rich.text import Text

    from kvpolicy.cli.terminal import Console

    table = Table("role", "name", "from", "status", "what it does, when to use it")
    for row in rows:
        status = Text(row.status, style="" if row.status == "ok" else "red")
        about = Text(row.error or row.summary)
        if row.when and not row.error:
            about.append(f"\n{row.when}", style="dim")
        table.add_row(row.role, row.name, f"{row.distribution} {row.version}", status, about)
    Console().print(table)
