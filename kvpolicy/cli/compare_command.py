"""`kvpolicy compare`: methods side by side at equal bytes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvpolicy.cli import options as opt
from kvpolicy.cli.terminal import say
from kvpolicy.cli.watch import watcher
from kvpolicy.defaults import LEAST_SEQUENCES, MODEL

if TYPE_CHECKING:
    from kvpolicy.verbs.compare import SideBySide

_MORE = "More methods, as for --methods."


def compare_command(
    more: Annotated[list[str] | None, typer.Argument(help=_MORE, show_default=False)] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            help="POLICY/ALLOCATOR, POLICY (under uniform), a plan file, POLICY/PLAN, or quantized/int4 (int2, fp8, "
            "kivi4, kivi2); "
            "behind any of the first a format of the entries, snapkv@int4 (int8), at the same bytes; "
            "with parameters, in quotes: 'POLICY(NAME=JSON, ...)'. More may follow as arguments.",
            show_default=False,
        ),
    ] = None,
    task: opt.TaskName = "perplexity",
    question: opt.Question = "aware",
    data: opt.Data = None,
    task_file: opt.TaskFile = None,
    retention: Annotated[list[float] | None, opt.retentions("0.5, 0.3, 0.1")] = None,
    text: opt.Text = None,
    context: Annotated[
        int, typer.Option(help="Tokens of one sequence, prompt included, or of one retrieval prompt.")
    ] = 1024,
    prefill: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Tokens of the prompt that is compressed; 0: decode from the first token on. Default: half.",
            show_default=False,
        ),
    ] = None,
    part: Annotated[
        str, typer.Option(help="Of --text: heldout, or whole for a text that no plan was tuned on.")
    ] = "heldout",
    limit: Annotated[int, typer.Option(min=LEAST_SEQUENCES, help="Most sequences or samples to measure.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap, the shuffled rows and the prompts.")] = 0,
    out: Annotated[
        Path, typer.Option(help="The rows as JSON; a table beside it as .md. Rows that the file already has are kept.")
    ] = Path("compare.json"),
    png: Annotated[
        Path | None, typer.Option(help="Draw quality over bytes, and a bar for each row.", show_default=False)
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a report as one HTML file.", show_default=False)] = None,
    model: opt.Model = MODEL,
    device: opt.Device = "auto",
    dtype: opt.DType = "auto",
    revision: opt.Revision = None,
    batch_size: opt.BatchSize = 1,
    no_timing: Annotated[
        bool, typer.Option("--no-timing", help="Do not time decoding, as while others use the device.")
    ] = False,
    config: opt.Config = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> int:
    """Compare methods at equal bytes: quality with intervals, bytes, decode time, and who is better than whom.

    Every method compresses the same prompts once. Under perplexity the text behind a prompt is scored, on the held-out
    part of --text; a task asks for what stands in the prompt, and scores the answers. With --prefill 0 every
    token is decoded under the budget, which is for methods under a window rule. The controls are always added: the full
    cache, entries kept at random (random), uniform budgets under each policy, and each plan's or allocator's budgets
    shuffled over the KV heads.

    Rows that --out already has, measured under the same settings, are not measured again. A method that fails becomes a
    row that says why; if you asked for it, the exit code is 2.
    """
    from kvpolicy.verbs.compare import compare

    answer = compare(
        [*(methods or []), *(more or [])],
        task=task,
        question=question,
        data=data,
        task_file=task_file,
        retention=retention,
        text=text,
        context=context,
        prefill=prefill,
        part=part,
        limit=limit,
        seed=seed,
        out=out,
        png=png,
        html=html,
        model=model,
        device=device,
        dtype=dtype,
        revision=revision,
        batch_size=batch_size,
        no_timing=no_timing,
        progress=watcher(quiet),
    )
    if json:
        opt.print_json(answer.to_json())
    else:
        _show(answer)
    if answer.failed:
        named = ", ".join(f"{row.method} at {row.retention:g}" for row in answer.failed)
        say(f"error: failed, and their rows say why: {named}")
    return 2 if answer.failed else 0  # not an error on its way: --json prints what was measured


def _show(answer: SideBySide) -> None:
    from kvpolicy.cli.terminal import Console
    from kvpolicy.report.comparison_tables import tables

    console = Console()
    for table, notes in tables(answer.comparison):
        console.print(table)
        for note in notes:
            console.print(note, soft_wrap=True)
    console.print(f"written to {answer.out} and {answer.page}", soft_wrap=True)
