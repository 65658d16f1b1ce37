"""`kvpolicy show`: a plan as tables and heat maps, in the terminal and as files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvpolicy.cli import options as opt
from kvpolicy.files.regular import write_bytes


def show(
    plan: Annotated[Path, typer.Argument(help="A plan file.")],
    html: Annotated[Path | None, typer.Option(help="Write one self-contained HTML file.")] = None,
    png: Annotated[Path | None, typer.Option(help="Write the heat maps as one picture.")] = None,
    config: opt.Config = None,
    json: opt.Json = False,
) -> None:
    """Show what a plan keeps, where, and how it did on text that the search never saw."""
    from kvpolicy.budget.plan import load_plan
    from kvpolicy.verbs import arguments

    loaded = load_plan(plan)
    for path in (html, png):
        arguments.check_writable(path)
    if html is not None:
        from kvpolicy.report.html import plan_html

        write_bytes(html, plan_html(loaded).encode())
    if png is not None:
        from kvpolicy.report.heatmap import plan_png

        write_bytes(png, plan_png(loaded))
    if json:
        opt.print_json(loaded.to_json())
        return
    from kvpolicy.cli.terminal import Console, say
    from kvpolicy.report.tables import facts_table, levels_table, summary_table, warnings_of
    from kvpolicy.report.terminal_heatmap import budget_heatmap

    console = Console()
    console.print(summary_table(loaded))
    console.print()
    console.print(levels_table(loaded))
    if (facts := facts_table(loaded)) is not None:
        console.print(facts)
    for level in loaded.levels:
        console.print(budget_heatmap(loaded, level))
    for path in (html, png):
        if path is not None:
            console.print(f"written: {path}", soft_wrap=True)
    for line in warnings_of(loaded):  # last: heat maps are long
        say(line)
