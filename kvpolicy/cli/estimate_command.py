"""`kvpolicy estimate`: memory from the configuration alone, before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from kvpolicy.cli import options as opt
from kvpolicy.defaults import MODEL

if TYPE_CHECKING:
    from kvpolicy.verbs.estimate import Estimate


def estimate_command(
    model: opt.Model = MODEL,
    context: Annotated[int, typer.Option(min=1, help="Tokens of one sequence.")] = 4096,
    retention: Annotated[list[float] | None, opt.retentions("0.5, 0.3, 0.1")] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences in the cache.")] = 1,
    policy: Annotated[str, typer.Option(help="Eviction policy; most hold a score beside each entry.")] = "streaming",
    dtype: Annotated[str, typer.Option(help="Of cache and weights: float32, bfloat16, float16.")] = "bfloat16",
    device: opt.Device = "auto",
    revision: opt.Revision = None,
    config: opt.Config = None,
    json: opt.Json = False,
) -> None:
    """Compute what a cache will weigh, kept and full, from the model's configuration, and whether it fits here.

    It fits if weights and caches stay below the memory of --device, also at the end of a prompt, when one layer is
    still whole. Activations are not counted.
    """
    from kvpolicy.verbs.estimate import estimate

    answer = estimate(
        model,
        context=context,
        retention=retention,
        batch=batch,
        policy=policy,
        dtype=dtype,
        device=device,
        revision=revision,
    )
    if json:
        opt.print_json(answer.to_json())
    else:
        _show(answer, f"{model}: {batch} x {context} tokens under {policy}, all in {dtype}")


def _show(answer: Estimate, name: str) -> None:
    from kvpolicy.cli.terminal import Console
    from kvpolicy.measure.machine import device_name
    from kvpolicy.report.grid import Grid
    from kvpolicy.report.numbers import percent, size

    first, memory = answer.rows[0], answer.device_bytes
    about = "" if answer.weights_note is None else f", {answer.weights_note}"
    columns = ("kept", "cache", "of that tables", "full cache", "caches in prefill", "weights + cache")
    rows = [
        (
            percent(row.retention),
            size(row.cache_bytes),
            size(row.table_bytes),
            size(row.dynamic_cache_bytes),
            size(row.prefill_peak_bytes),
            size(row.total_bytes),
            *{True: ["yes"], False: ["no"], None: []}[answer.fits(row)],
        )
        for row in answer.rows
    ]
    console = Console()
    console.print(f"{name} (weights {size(first.weights_bytes or 0)}{about})", soft_wrap=True)
    console.print(Grid([*columns, *(["fits"] if memory else [])], rows))
    if memory is not None:
        full = "fits" if first.dynamic_total_bytes <= memory else "does not fit"
        note = f"{device_name(answer.device)} has {size(memory)}; the full cache {full} beside the weights"
        console.print(note, soft_wrap=True)
