"""`kvpolicy eval`: quality under a plan, at measured bytes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvpolicy.cli import cache_options
from kvpolicy.cli import options as opt
from kvpolicy.cli.watch import watcher
from kvpolicy.plugins.params import parse_params

if TYPE_CHECKING:
    from kvpolicy.verbs.eval import Evaluation


def eval_command(
    plan: Annotated[str, typer.Argument(help="A plan file, or: uniform, full.", show_default=False)] = "full",
    task: opt.TaskName = "perplexity",
    question: opt.Question = "aware",
    data: opt.Data = None,
    task_file: opt.TaskFile = None,
    records: Annotated[
        Path | None,
        typer.Option(help="A JSONL file for what each sample of a task gave; it is gone on with.", show_default=False),
    ] = None,
    retention: Annotated[list[float] | None, opt.retentions("the plan's levels; needed for uniform")] = None,
    policy: cache_options.Policy = None,
    policy_param: opt.PolicyParams = None,
    format: cache_options.Format = None,
    model: cache_options.ModelOfPlan = None,
    text: opt.Text = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens of one sequence or prompt; default: the plan's, or 1024.")
    ] = None,
    prefill: Annotated[int | None, opt.prefills("the plan's, else ")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Most sequences or samples to measure.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap and the samples.")] = 0,
    device: opt.Device = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            help="auto, float32, bfloat16, float16; auto is the plan's own.",
            rich_help_panel="Model",
        ),
    ] = "auto",
    revision: opt.Revision = None,
    batch_size: opt.BatchSize = 1,
    png: Annotated[
        Path | None,
        typer.Option(help="Draw the scores of a task by depth and length (needle-grid).", show_default=False),
    ] = None,
    config: opt.Config = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Measure quality and bytes: perplexity on the held-out part of a text (which tune never searches), or a task.

    Perplexity is exact for token-by-token decoding under the plan's capacities. Under the window rule all tokens are
    decoded so, and those past the first quarter of each sequence are scored. Under any other policy the first --prefill
    tokens are a prompt, which is compressed once; what follows is kept on top of the capacities (decode="append") and
    scored. Bytes are those of one real cache, filled with one sequence or one prompt. The output names the protocol;
    figures of two protocols cannot be compared. The full cache and uniform budgets are measured beside the plan.

    A task has prompts with answers. Each is compressed once, with its question or before the question comes; questions
    and answers that follow are kept on top. Answers are greedy, and their mean score is given.
    """
    from kvpolicy.verbs.eval import eval as evaluate

    answer = evaluate(
        plan,
        task=task,
        question=question,
        data=data,
        task_file=task_file,
        records=records,
        retention=retention,
        policy=policy,
        policy_param=parse_params(policy_param, "--policy-param"),
        format=format,
        model=model,
        text=text,
        context=context,
        prefill=prefill,
        limit=limit,
        seed=seed,
        device=device,
        dtype=dtype,
        revision=revision,
        batch_size=batch_size,
        png=png,
        progress=watcher(quiet),
    )
    if json:
        opt.print_json(answer.to_json())
    else:
        _show(answer)


def _show(answer: Evaluation) -> None:
    from kvpolicy.budget.entry_format import MODEL
    from kvpolicy.cli.terminal import Console
    from kvpolicy.report.depth_map import depth_maps, terminal_depths
    from kvpolicy.report.grid import Grid
    from kvpolicy.report.numbers import percent, size

    metric = answer.rows[0].get("metric", "perplexity")
    rows = [
        (
            row["plan"],
            percent(row["retention"]),
            f"{row[metric]:.3f}",
            "{:.3f} to {:.3f}".format(*row["interval"]),
            size(row["bytes"]),
            size(row["dense_bytes"]),
            str(row["n"]),
        )
        for row in answer.rows
    ]
    console = Console()
    console.print(Grid(["plan", "kept", metric.replace("_", " "), "95 %", "bytes", "of full", "n"], rows))
    for depths in depth_maps(answer.rows):
        console.print(terminal_depths(depths))
    first, own = answer.rows[0], list(dict.fromkeys(row["format"] for row in answer.rows if row["format"] != MODEL))
    caption = f"measured under {first['policy']}: {answer.described}; in {first['dtype']}"
    console.print(caption, soft_wrap=True)
    if own:
        console.print(f"entries of all but the full cache: {'; '.join(own)}", soft_wrap=True)
