"""`kvpolicy estimate`: memory from the configuration alone, before anything is loaded."""

from __future__ import annotations

from typing import Annotated

import typer

from kvpolicy.cli import options as opt
from kvpolicy.errors import ModelError
from kvpolicy.estimate import estimate_memory
from kvpolicy.spec import ModelSpec

_ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


def estimate(
    model: opt.Model = "smollm2-135m",
    context: Annotated[int, typer.Option(min=1, help="Tokens of one sequence.")] = 4096,
    retention: Annotated[list[float] | None, opt.retentions("0.5, 0.3, 0.1")] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences.")] = 1,
    dtype: Annotated[str, typer.Option(help="Of cache and weights: float32, bfloat16, float16.")] = "bfloat16",
    revision: opt.Revision = None,
    json: opt.Json = False,
) -> None:
    """What a cache will weigh, kept and full, computed from the model's configuration."""
    if dtype not in _ITEMSIZE:
        raise ModelError(f"--dtype must be one of {', '.join(_ITEMSIZE)}, got '{dtype}'")
    retentions = [opt.check_retention(r) for r in (retention or [0.5, 0.3, 0.1])]

    from kvpolicy.integrations.transformers import load_config, weights_of

    config = load_config(model, revision=revision)
    spec, size = ModelSpec.from_config(config), _ITEMSIZE[dtype]
    weights = weights_of(config, size)
    rows = [estimate_memory(spec, context, kept, batch, size, weights.nbytes) for kept in retentions]
    if json:
        documents = [{**row.to_json(), "weights_note": weights.note} for row in rows]
        opt.print_json(documents[0] if len(documents) == 1 else documents)
        return
    from rich.table import Table

    from kvpolicy.cli.terminal import Console

    about = "" if weights.note is None else f", {weights.note}"
    title = f"{model}: {batch} x {context} tokens, all in {dtype}, MB (weights {weights.nbytes / 1e6:.0f}{about})"
    table = Table("kept", "cache", "of that tables", "full cache", "caches in prefill", "weights + cache", title=title)
    for row in rows:
        figures = (
            row.cache_bytes,
            row.table_bytes,
            row.dynamic_cache_bytes,
            row.prefill_peak_bytes,
            row.total_bytes,
        )
        table.add_row(f"{row.retention:.0%}", *(f"{figure / 1e6:.2f}" for figure in figures))
    Console().print(table)
