"""What holds for every option of every verb, whoever adds one."""

from __future__ import annotations

from typing import Any, cast

import typer
from typer.core import TyperCommand

from kvpolicy.cli import configuration
from kvpolicy.cli.watch import turning

LARGEST = 2**31 - 1
"""Positions are 32 bits wide, and seeds are multiplied."""


class Verb(TyperCommand):
    """A verb whose numbers are of a size to compute with and whose texts are text. Else it is a usage error."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        paragraphs = (self.help or "").split("\n\n")
        self.help = "\n\n".join(" ".join(lines.split()) for lines in paragraphs)  # lines are the terminal's to break

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        rest: list[str] = super().parse_args(ctx, args)
        for param in self.params:
            value = ctx.params.get(param.name)
            for item in value if isinstance(value, list | tuple) else [value]:
                if (wrong := _wrong(item)) is not None:
                    raise typer.BadParameter(wrong, ctx=ctx, param=cast(Any, param))
        return rest

    def invoke(self, ctx: Any) -> Any:
        result = super().invoke(ctx)
        configuration.keep(ctx)
        return result


class TorchVerb(Verb):
    """A verb that has nothing to say before torch is there."""

    def invoke(self, ctx: Any) -> Any:
        if not ctx.params.get("quiet", False):
            with turning("loading torch"):
                import torch  # noqa: F401
        return super().invoke(ctx)


def _wrong(value: Any) -> str | None:
    """What is wrong with one value, None if nothing is."""
    if isinstance(value, int) and abs(value) > LARGEST:
        return f"{value} is out of range: at most {LARGEST}."
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            return f"{value!r} is not UTF-8 text, from character {error.start} on."
    return None
