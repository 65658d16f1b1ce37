"""`kvpolicy estimate`: memory from the configuration alone, before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from kvpolicy.cli import cache_options
from kvpolicy.cli import options as opt
from kvpolicy.cli.watch import turning
from kvpolicy.defaults import MODEL

if TYPE_CHECKING:
    from kvpolicy.verbs.estimate import Estimate


def estimate_command(
    model: opt.Model = MODEL,
    context: Annotated[int, typer.Option(min=1, help="Tokens of one sequence.")] = 4096,
    retention: Annotated[list[float] | None, opt.retentions("0.5, 0.3, 0.1")] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences in the cache.")] = 1,
    policy: Annotated[str, typer.Option(help="Eviction policy; most hold a score beside each entry.")] = "streaming",
    format: cache_options.Format = None,
    dtype: Annotated[str, typer.Option(help="Of cache and weights: float32, bfloat16, float16.")] = "bfloat16",
    gpu_memory: Annotated[
        str | None,
        typer.Option(help="What it must fit into, such as 24GB; default: the memory of --device.", show_default=False),
    ] = None,
    device: opt.Device = "auto",
    revision: opt.Revision = None,
    config: opt.Config = None,
    json: opt.Json = False,
) -> None:
    """Compute what a generation will weigh from the model's configuration, whether it fits, and the most that does.

    At most, in all: weights, caches and activations at the end of a prompt that is fed at once, when one layer is still
    whole. The largest context is that at --batch, the largest batch that at --context. What CUDA itself takes, some
    hundred MB, is not counted.
    """
    with turning(f"reading the configuration of {model}"):
        from kvpolicy.verbs.estimate import estimate

        answer = estimate(
            model,
            context=context,
            retention=retention,
            batch=batch,
            policy=policy,
            format=format,
            dtype=dtype,
            gpu_memory=gpu_memory,
            device=device,
            revision=revision,
        )
    if json:
        opt.print_json(answer.to_json())
    else:
        _show(answer, f"{model}: {batch} x {context} tokens under {policy}, {_kept_in(answer, dtype)}")


def _kept_in(answer: Estimate, dtype: str) -> str:
    if answer.entry_format == "model":
        return f"all in {dtype}"
    return f"entries in {answer.entry_format}, all else in {dtype}"


def _show(answer: Estimate, name: str) -> None:
    from kvpolicy.cli.terminal import Console
    from kvpolicy.measure.machine import device_name
    from kvpolicy.report.grid import Grid
    from kvpolicy.report.numbers import percent, size

    first, memory = answer.rows[0], answer.device_bytes
    note = "" if answer.weights_note is None else f", {answer.weights_note}"
    rows = [["full cache", size(first.dynamic_cache_bytes), size(first.dynamic_peak_bytes)]]
    rows += [[percent(row.retention), size(row.cache_bytes), size(row.peak_bytes)] for row in answer.rows]
    columns = ["kept", "cache", "at most, in all"]
    if memory is not None and answer.limits is not None and answer.full_limits is not None:
        columns += ["fits", "largest context", "largest batch"]
        peaks = [first.dynamic_peak_bytes, *(row.peak_bytes for row in answer.rows)]
        for row, peak, limits in zip(rows, peaks, (answer.full_limits, *answer.limits), strict=True):
            row += ["yes" if peak <= memory else "no", str(limits.context), str(limits.batch)]
    console = Console()
    console.print(f"{name} (weights {size(first.weights_bytes or 0)}{note})", soft_wrap=True)
    console.print(Grid(columns, rows))
    if memory is None:
        return
    where = "The memory that was given is" if answer.device == "given" else f"{device_name(answer.device)} has"
    fits = "fits" if first.dynamic_peak_bytes <= memory else "does not fit"
    console.print(f"{where} {size(memory)}; the full cache {fits} beside the weights", soft_wrap=True)
    if answer.max_context:
        console.print(f"contexts end at {answer.max_context} tokens, which the model was made for", soft_wrap=True)
