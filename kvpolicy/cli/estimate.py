"""`kvpolicy estimate`: memory from the configuration alone, before anything is loaded."""

from __future__ import annotations

from typing import Annotated

import typer

from kvpolicy.cli import options as opt
from kvpolicy.defaults import MODEL, RETENTIONS
from kvpolicy.errors import ModelError
from kvpolicy.measure.machine import device_name, memory_bytes
from kvpolicy.measure.memory import MemoryEstimate, estimate_memory
from kvpolicy.model.spec import ModelSpec
from kvpolicy.plugins.registry import registry

_ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


def estimate(
    model: opt.Model = MODEL,
    context: Annotated[int, typer.Option(min=1, help="Tokens of one sequence.")] = 4096,
    retention: Annotated[list[float] | None, opt.retentions("0.5, 0.3, 0.1")] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences.")] = 1,
    policy: Annotated[str, typer.Option(help="Eviction policy; most hold a score beside each entry.")] = "streaming",
    dtype: Annotated[str, typer.Option(help="Of cache and weights: float32, bfloat16, float16.")] = "bfloat16",
    device: opt.Device = "auto",
    revision: opt.Revision = None,
    json: opt.Json = False,
) -> None:
    """What a cache will weigh, kept and full, computed from the model's configuration, and whether it fits here.

    It fits where weights and caches are less than the memory of --device, also at the end of a prompt, when one layer
    is whole yet. Activations are not counted.
    """
    if dtype not in _ITEMSIZE:
        raise ModelError(f"--dtype must be one of {', '.join(_ITEMSIZE)}, got '{dtype}'")
    where = opt.pick_device(device)
    evicting = registry.create("policy", policy)
    retentions = [opt.check_retention(r) for r in (retention or RETENTIONS)]

    from kvpolicy.integrations.transformers import load_config, weights_of

    config = load_config(model, revision=revision)
    spec, itemsize = ModelSpec.from_config(config), _ITEMSIZE[dtype]
    weights = weights_of(config, itemsize)
    rows = [estimate_memory(spec, context, kept, batch, itemsize, weights.nbytes, evicting) for kept in retentions]
    memory = memory_bytes(where)
    if json:
        more = {"policy": policy, "weights_note": weights.note, "device": where, "device_bytes": memory}
        documents = [row.to_json() | more | {"fits": _fits(row, memory)} for row in rows]
        opt.print_json(documents[0] if len(documents) == 1 else documents)
        return
    from rich.table import Table

    from kvpolicy.cli.terminal import Console
    from kvpolicy.report.numbers import size

    about = "" if weights.note is None else f", {weights.note}"
    asked = f"{batch} x {context} tokens under {policy}"
    title = f"{model}: {asked}, all in {dtype} (weights {size(weights.nbytes)}{about})"
    columns = ("kept", "cache", "of that tables", "full cache", "caches in prefill", "weights + cache")
    table = Table(*columns, *(["fits"] if memory else []), title=title)
    for row in rows:
        figures = (
            row.cache_bytes,
            row.table_bytes,
            row.dynamic_cache_bytes,
            row.prefill_peak_bytes,
            row.total_bytes,
        )
        fits = {True: ["yes"], False: ["no"], None: []}[_fits(row, memory)]
        table.add_row(f"{100 * row.retention:.4g}%", *(size(figure) for figure in figures), *fits)
    console = Console()
    console.print(table)
    if memory is not None:
        full = "fits" if rows[0].dynamic_total_bytes <= memory else "does not fit"
        console.print(
            f"{device_name(where)} has {size(memory)}; the full cache {full} beside the weights", soft_wrap=True
        )


def _fits(row: MemoryEstimate, memory: int | None) -> bool | None:
    """Whether weights and caches fit at their largest, behind a prompt; None where the memory is not known."""
    return None if memory is None else (row.weights_bytes or 0) + row.prefill_peak_bytes <= memory
