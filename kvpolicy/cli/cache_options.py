"""The options that say which cache a model runs over."""

from __future__ import annotations

from typing import Annotated

import typer

PlanName = Annotated[str, typer.Argument(help="A plan file, or: uniform, full.", show_default=False)]
Policy = Annotated[str | None, typer.Option(help="Default: the plan's, or streaming.", show_default=False)]
Allocator = Annotated[
    str | None,
    typer.Option(help="Splits the budget where there is no plan; default: uniform.", show_default=False),
]
MinTokens = Annotated[int, typer.Option(min=1, help="Least entries of a KV head, on average.")]
ModelOfPlan = Annotated[
    str | None, typer.Option(help="As for tune; default: the plan's model.", rich_help_panel="Model")
]
