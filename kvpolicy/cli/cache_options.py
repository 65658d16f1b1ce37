"""The options that say which cache a model runs over."""

from __future__ import annotations

from typing import Annotated

import typer

PlanName = Annotated[str, typer.Argument(help="A plan file, or: uniform, full.", show_default=False)]
Policy = Annotated[
    str | None, typer.Option(help="Eviction policy; default: the plan's, or streaming.", show_default=False)
]
Allocator = Annotated[
    str | None,
    typer.Option(help="What splits the budget where there is no plan; default: uniform.", show_default=False),
]
Format = Annotated[
    str | None,
    typer.Option(
        help="Format of the entries: int8, int4, think, or model, the model's dtype; default: the plan's own, else "
        "model.",
        show_default=False,
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        help="Instead of a retention: bytes of the whole text's cache, as 8MB, or a part of the full cache's, as 0.15.",
        show_default=False,
    ),
]
MinTokens = Annotated[int, typer.Option(min=1, help="Mean entries per KV head that are kept whatever the retention.")]
ModelOfPlan = Annotated[
    str | None, typer.Option(help="As for tune; default: the plan's model.", rich_help_panel="Model")
]
