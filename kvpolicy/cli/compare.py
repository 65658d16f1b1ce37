"""`kvpolicy compare`: methods side by side at equal bytes."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpolicy.cli import options as opt
from kvpolicy.cli.terminal import say
from kvpolicy.cli.watch import watcher
from kvpolicy.comparison.results_file import RETRIEVAL, TASKS
from kvpolicy.defaults import MODEL, RETENTIONS
from kvpolicy.errors import BudgetError, KVPolicyError, TextError
from kvpolicy.files.regular import write_bytes

if TYPE_CHECKING:
    from kvpolicy.budget.plan import BudgetPlan
    from kvpolicy.comparison.task import RetrievalTask, Task
    from kvpolicy.text.corpus import Corpus

PARTS = ("heldout", "whole")
LEAST_SEQUENCES = 2  # of one, a bootstrap says nothing
_MORE = "Methods, as for --methods."


def compare_command(
    more: Annotated[list[str] | None, typer.Argument(help=_MORE, show_default=False)] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            help="POLICY/ALLOCATOR, POLICY (under uniform), a plan file, POLICY/PLAN, or quantized/int4 (int2, fp8); "
            "more may follow as arguments.",
            show_default=False,
        ),
    ] = None,
    task: Annotated[str, typer.Option(help="What to measure: perplexity, passkey, key-value.")] = "perplexity",
    retention: Annotated[list[float] | None, opt.retentions("0.5, 0.3, 0.1")] = None,
    text: opt.Text = None,
    context: Annotated[int, typer.Option(help="Tokens of one sequence or retrieval prompt.")] = 1024,
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
    limit: Annotated[int, typer.Option(min=LEAST_SEQUENCES, help="Sequences or retrieval prompts at most.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the bootstrap, the shuffled rows and the prompts.")] = 0,
    out: Annotated[
        Path, typer.Option(help="The rows as JSON; a table beside it as .md. Rows that the file already has are kept.")
    ] = Path("compare.json"),
    png: Annotated[
        Path | None, typer.Option(help="Draw quality over bytes, and a bar for each row.", show_default=False)
    ] = None,
    model: opt.Model = MODEL,
    device: opt.Device = "auto",
    dtype: opt.DType = "auto",
    revision: opt.Revision = None,
    batch_size: opt.BatchSize = 1,
    no_timing: Annotated[
        bool, typer.Option("--no-timing", help="Leave out decode time, as where others use the device.")
    ] = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> int:
    """Compare methods at equal bytes: quality with intervals, bytes, decode time, and who is better than whom.

    Every method compresses the same prompts once. Under perplexity the text behind a prompt is scored, on the held-out
    part of --text; under passkey and key-value a number that stands in the prompt is asked for. With --prefill 0 every
    token is decoded under the budget, which is for methods under a window rule. The full cache, entries kept at random
    (random), uniform budgets under each policy, and each plan's or allocator's budgets shuffled over the KV heads are
    always there.

    Rows that --out has already, measured under the same settings, are not measured again. A method that fails is a row
    that says why, and where it was asked for the exit code is 2.
    """
    names = [*(methods or []), *(more or [])]
    _check(task, names, context, prefill, part)
    retentions = [_below_one(r) for r in (retention or RETENTIONS)]
    page = out.with_suffix(".md")
    if page == out:
        raise KVPolicyError(f"--out is the JSON file, and {page} its table: give another name than {out}")
    for path in (out, page, *([png] if png else [])):
        opt.check_writable(path)
    from kvpolicy.comparison.methods import check_asked, read_asked, read_methods

    asked = read_asked(names)
    check_asked(asked, retentions, prefill)
    opt.check_text(text)
    where = opt.pick_device(device)
    number = opt.pick_dtype(dtype, where)

    from kvpolicy.comparison.run import compare
    from kvpolicy.integrations.transformers import load_model, read_corpus, weights_sha256
    from kvpolicy.report.comparison_tables import markdown

    chosen = read_methods(names)
    network, tokenizer = load_model(model, revision=revision, device=where, dtype=number)
    number = str(network.dtype).removeprefix("torch.")
    plans = [method.plan for method in chosen if method.plan is not None]
    made: Task
    about: dict[str, Any] = {}
    if task in RETRIEVAL:
        made = _questions(task, network, tokenizer, context, limit, batch_size, seed)
    else:
        corpus = _unseen(read_corpus(tokenizer, text), part, plans)
        made, about = _text_task(network, tokenizer, corpus, part, context, prefill, limit, batch_size)
    about |= {"model": model, "measured": made.described, "sequences": made.count, "dtype": number}
    settings = {"weights": weights_sha256(network), "dtype": number, "kvpolicy": version("kvpolicy")}
    progress = watcher(quiet)
    try:
        found = compare(
            made,
            chosen,
            retentions,
            out,
            seed=seed,
            settings=settings,
            about=about,
            timing=not no_timing,
            progress=progress,
        )
    except KeyboardInterrupt:
        progress.note(f"interrupted; rows that were measured are in {out}: run the same command to go on")
        raise
    write_bytes(page, markdown(found).encode())
    if png is not None:
        from kvpolicy.report.comparison_figure import comparison_png

        write_bytes(png, comparison_png(found))
    _report(found, out, page, json)
    requested = {method.name for method in asked}
    failed = [row for row in found.rows.values() if row.error is not None and row.method in requested]
    if failed:
        named = ", ".join(f"{row.method} at {row.retention:g}" for row in failed)
        say(f"error: failed, and their rows say why: {named}")
    return 2 if failed else 0  # not an error on its way: --json prints what was measured


def _check(task: str, names: list[str], context: int, prefill: int | None, part: str) -> None:
    if task not in TASKS:
        raise KVPolicyError(f"no task named '{task}'; there is: {', '.join(TASKS)}")
    if not names:
        raise KVPolicyError("name the methods to compare: --methods POLICY/ALLOCATOR or a plan file, one or several")
    opt.check_context(context)
    if part not in PARTS:
        raise KVPolicyError(f"--part must be {' or '.join(PARTS)}, got '{part}'")
    if task in RETRIEVAL and prefill is not None:
        raise BudgetError(f"--prefill goes with perplexity: the prompts of {task} are compressed whole")


def _below_one(retention: float) -> float:
    if opt.check_retention(retention) == 1:
        raise BudgetError("--retention 1 keeps everything: the full cache is always compared, give fractions below 1")
    return retention


def _questions(
    name: str, network: Any, tokenizer: Any, context: int, limit: int, batch_size: int, seed: int
) -> RetrievalTask:
    """Raises `TextError` for a context without room."""
    from kvpolicy.comparison.task import RetrievalTask
    from kvpolicy.tasks.questions import make_key_values, make_passkeys

    make = make_passkeys if name == "passkey" else make_key_values
    return RetrievalTask(name, network, tokenizer, make(tokenizer, limit, context, seed), batch_size=batch_size)


def _unseen(corpus: Corpus, part: str, plans: list[BudgetPlan]) -> Corpus:
    """The corpus itself. Raises `TextError` where the whole of it is asked for and a plan was tuned on it."""
    if part == "whole" and any(plan.provenance.get("text_sha256") == corpus.sha256 for plan in plans):
        raise TextError(
            f"--part whole: a plan was tuned on a part of {corpus.name}; leave --part out, or give another --text"
        )
    return corpus


def _text_task(
    network: Any,
    tokenizer: Any,
    corpus: Corpus,
    part: str,
    context: int,
    prefill: int | None,
    limit: int,
    batch_size: int,
) -> tuple[Task, dict[str, Any]]:
    """The task, and what a reader is told about its text. Raises `TextError` and `BudgetError`."""
    from kvpolicy.comparison.decoding import DecodingTask
    from kvpolicy.comparison.task import PerplexityTask

    count = max(LEAST_SEQUENCES, min(limit, corpus.room(part, context)))
    sequences = corpus.sequences(part, count, context)
    told = {"text": corpus.name if part == "whole" else f"{corpus.name}, held-out part"}
    if prefill == 0:
        return DecodingTask(network, sequences, batch_size=batch_size), told
    options = {"prefill_length": prefill, "batch_size": batch_size, "tokenizer": tokenizer}
    return PerplexityTask(network, sequences, **options), told


def _report(found: Any, out: Path, page: Path, as_json: bool) -> None:
    if as_json:
        from kvpolicy.comparison.quality import summary

        opt.print_json({"settings": found.settings, "about": found.about, "rows": summary(found)})
        return
    from kvpolicy.cli.terminal import Console
    from kvpolicy.report.comparison_tables import tables

    console = Console()
    for table, notes in tables(found):
        console.print(table)
        for note in notes:
            console.print(note, soft_wrap=True)
    console.print(f"written to {out} and {page}", soft_wrap=True)
