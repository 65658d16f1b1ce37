"""`kvpolicy lm-eval`: tasks of lm-evaluation-harness over compressed caches."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvpolicy.cli import cache_options
from kvpolicy.cli import options as opt
from kvpolicy.cli.watch import watcher
from kvpolicy.defaults import MIN_TOKENS
from kvpolicy.plugins.params import parse_params

if TYPE_CHECKING:
    from kvpolicy.verbs.lm_harness import HarnessRun


def lm_eval_command(
    plan: cache_options.PlanName = "full",
    tasks: Annotated[
        list[str] | None,
        typer.Option(help="A task of lm-evaluation-harness; repeatable.", show_default=False),
    ] = None,
    retention: Annotated[
        float | None,
        typer.Option(
            "--retention",
            "-r",
            help="Kept fraction of a context. Default: the plan's highest level; needed for uniform.",
            show_default=False,
        ),
    ] = None,
    policy: cache_options.Policy = None,
    policy_param: opt.PolicyParams = None,
    allocator: cache_options.Allocator = None,
    min_tokens: cache_options.MinTokens = MIN_TOKENS,
    format: cache_options.Format = None,
    include_path: Annotated[
        Path | None, typer.Option(help="A folder of YAML files with tasks of your own.", show_default=False)
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before each question; default: the task's.", show_default=False)
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Samples of each task; default: all.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the harness.")] = 0,
    model: cache_options.ModelOfPlan = None,
    device: opt.Device = "auto",
    dtype: opt.DType = "auto",
    revision: opt.Revision = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Contexts of one generation.", rich_help_panel="Model")] = 1,
    config: opt.Config = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Run tasks of lm-evaluation-harness over caches that keep what a plan allows.

    A context is read and compressed once, with the question in it; the answer behind it is scored or generated, and
    kept on top. The choices of a question go on from copies of one cache, and a rolling log-likelihood reads its text
    in chunks, each over what was kept of those before. Contexts up to --min-tokens tokens are kept whole. Needs the
    extra kvpolicy[lm-eval].
    """
    from kvpolicy.verbs.lm_harness import lm_eval

    answer = lm_eval(
        tasks or [],
        plan,
        retention=retention,
        policy=policy,
        policy_param=parse_params(policy_param, "--policy-param"),
        allocator=allocator,
        min_tokens=min_tokens,
        format=format,
        include_path=include_path,
        num_fewshot=num_fewshot,
        limit=limit,
        seed=seed,
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


def _show(answer: HarnessRun) -> None:
    from kvpolicy.budget.entry_format import MODEL
    from kvpolicy.cli.terminal import Console
    from kvpolicy.report.grid import Grid
    from kvpolicy.report.numbers import percent

    rows = [
        (task, name, f"{value:.4f}", str(figures["n"]))
        for task, figures in answer.results.items()
        for name, value in figures.items()
        if isinstance(value, float)
    ]
    console, run = Console(), answer.run
    console.print(Grid(["task", "figure", "value", "n"], rows))
    kept = f"{run['plan']}, {percent(run['retention'])} kept under {run['policy']}"
    kept += "" if run["format"] == MODEL else f", entries in {run['format']}"
    console.print(f"{kept}; contexts of up to {run['min_tokens']} tokens whole; in {run['dtype']}", soft_wrap=True)
