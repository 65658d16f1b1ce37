"""`kvpolicy validate`: whether a plan file is sound, runs here, and fits a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvpolicy.cli import options as opt
from kvpolicy.cli.terminal import say
from kvpolicy.cli.watch import turning


def validate_command(
    plan: Annotated[Path, typer.Argument(help="A plan file.")],
    model: Annotated[
        str | None,
        typer.Option(help="As for tune: the plan must fit its configuration.", rich_help_panel="Model"),
    ] = None,
    revision: opt.Revision = None,
    config: opt.Config = None,
    json: opt.Json = False,
) -> None:
    """Check a plan file: its fields, whether its policy is installed here, and whether it fits a model.

    A fault is one line that names the field, and exit code 2. No weights are read.
    """
    from kvpolicy.verbs.validate import validate

    with turning(f"checking {plan}"):
        sound = validate(plan, model=model, revision=revision)
    if json:
        opt.print_json(sound.to_json())
        return
    from kvpolicy.budget.entry_format import MODEL
    from kvpolicy.cli.terminal import Console
    from kvpolicy.report.numbers import percent

    pairs = zip(sound.retentions, sound.formats, strict=True)
    levels = ", ".join(percent(kept) + ("" if own == MODEL else f" in {own}") for kept, own in pairs)
    fits = "" if sound.checked_against is None else f", and fits {sound.checked_against}"
    line = f"{plan}: a sound plan of {sound.model or 'an unnamed model'} for {sound.policy}, {levels} kept{fits}"
    Console().print(line, soft_wrap=True)
    for warning in sound.warnings:
        say(f"warning: {warning}")
