"""`kvpolicy bench`: what decoding costs on this machine, under a plan and under a stock cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from kvpolicy.cli import cache_options
from kvpolicy.cli import options as opt
from kvpolicy.cli.watch import watcher
from kvpolicy.defaults import CONTEXT, MIN_TOKENS
from kvpolicy.plugins.params import parse_params

if TYPE_CHECKING:
    from kvpolicy.verbs.bench import Bench


def bench_command(
    plan: cache_options.PlanName = "uniform",
    retention: Annotated[list[float] | None, opt.retentions("the plan's levels; 0.5, 0.3, 0.1 for uniform")] = None,
    context: Annotated[int, typer.Option(help="Tokens of the prompt.")] = CONTEXT,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each cache; the caches take turns.")] = 3,
    text: opt.Text = None,
    policy: cache_options.Policy = None,
    policy_param: opt.PolicyParams = None,
    allocator: cache_options.Allocator = None,
    min_tokens: cache_options.MinTokens = MIN_TOKENS,
    format: cache_options.Format = None,
    model: cache_options.ModelOfPlan = None,
    device: opt.Device = "auto",
    dtype: opt.DType = "auto",
    revision: opt.Revision = None,
    batch_size: opt.BatchSize = 1,
    config: opt.Config = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Time a prompt and decoding under a plan and under transformers' DynamicCache, and weigh both caches.

    Every cache is fed the same text: --context tokens at once, then --new-tokens one by one. The caches take turns, so
    that a drift of the machine hits all of them; figures are medians over the repeats, the peak is the largest. A text
    that is too short is repeated.
    """
    from kvpolicy.verbs.bench import bench

    answer = bench(
        plan,
        retention=retention,
        context=context,
        new_tokens=new_tokens,
        repeats=repeats,
        text=text,
        policy=policy,
        policy_param=parse_params(policy_param, "--policy-param"),
        allocator=allocator,
        min_tokens=min_tokens,
        format=format,
        model=model,
        device=device,
        dtype=dtype,
        revision=revision,
        batch_size=batch_size,
        progress=watcher(quiet),
    )
    if json:
        opt.print_json(answer.to_json())
    else:
        _show(answer)


def _show(answer: Bench) -> None:
    from kvpolicy.budget.entry_format import MODEL
    from kvpolicy.cli.terminal import Console
    from kvpolicy.report.grid import Grid
    from kvpolicy.report.numbers import size

    run = answer.run
    title = "{model} on {device} in {dtype}: {batch_size} x {context_length} tokens, then {new_tokens}".format(**run)
    rows = [
        (
            row["cache"],
            f"{100 * row.get('kept', 1.0):.1f} %",
            f"{row['ms_per_token']:.2f}",
            f"{row['token_ratio']:.2f}",
            f"{1e3 * run['batch_size'] / row['ms_per_token']:.1f}",
            f"{row['first_token_seconds']:.2f} s",
            f"{row['first_token_ratio']:.2f}",
            size(row["bytes"]),
            f"{row['bytes_ratio']:.2f}",
            "" if row["peak_bytes"] is None else size(row["peak_bytes"]),
        )
        for row in (answer.dense, *answer.caches)
    ]
    console = Console()
    console.print(title, soft_wrap=True)
    columns = ["cache", "kept", "ms a token", "x", "tokens/s", "first token", "x", "bytes", "x", "peak"]
    console.print(Grid(columns, rows, optional=["tokens/s"]))
    threads = f"{run['threads']} thread{'s' * (run['threads'] > 1)}"
    note = f"medians of {run['repeats']}, {threads}; x: over the first row's"
    console.print(f"{note}; peak: most bytes above the model's, activations included", soft_wrap=True)
    for row in answer.caches:
        if row["format"] != MODEL:
            console.print(f"{row['cache']}: entries in {row['format']}", soft_wrap=True)
        if not row["evicted"] and row["retention"] is not None:
            note = f"{row['cache']}: nothing was evicted (--min-tokens keeps short prompts)"
            console.print(note, soft_wrap=True)
        if row["decoding"] == "eager" and run["device"] != "cpu":
            console.print(f"{row['cache']}: decoded without a CUDA graph: {row['why']}", soft_wrap=True)
