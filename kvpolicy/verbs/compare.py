"""Methods side by side at equal bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvpolicy.comparison.results_file import RETRIEVAL, Comparison, Row
from kvpolicy.defaults import LEAST_SEQUENCES, MODEL, RETENTIONS
from kvpolicy.errors import BudgetError, KVPolicyError, TextError
from kvpolicy.files.regular import write_bytes
from kvpolicy.progress import Progress
from kvpolicy.verbs import arguments
from kvpolicy.verbs.chosen_task import ChosenTask, chosen_task

if TYPE_CHECKING:
    from kvpolicy.comparison.methods import Method
    from kvpolicy.comparison.task import RetrievalTask, Task
    from kvpolicy.text.corpus import Corpus

PARTS = ("heldout", "whole")


@dataclass(frozen=True, slots=True)
class SideBySide:
    """What was measured.

    comparison: all rows of the file, also those of earlier runs
    failed:     the rows of the methods asked for that could not be measured; their `error` says why
    out, page:  where the rows and their table were written
    """

    comparison: Comparison
    failed: tuple[Row, ...]
    out: Path
    page: Path

    def to_json(self) -> dict[str, Any]:
        """What `kvpolicy compare --json` prints."""
        from kvpolicy.comparison.quality import summary

        comparison = self.comparison
        return {"settings": comparison.settings, "about": comparison.about, "rows": summary(comparison)}


def compare(
    methods: str | Path | Sequence[str | Path],
    *,
    task: str = "perplexity",
    question: str = "aware",
    data: str | Path | None = None,
    task_file: str | Path | None = None,
    retention: float | Sequence[float] | None = None,
    text: str | Path | None = None,
    context: int = 1024,
    prefill: int | None = None,
    part: str = "heldout",
    limit: int = 8,
    seed: int = 0,
    out: str | Path = "compare.json",
    png: str | Path | None = None,
    html: str | Path | None = None,
    model: str | Path = MODEL,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    batch_size: int = 1,
    no_timing: bool = False,
    progress: Progress | None = None,
) -> SideBySide:
    """Compares methods at equal bytes: quality with intervals, bytes, decode time, and who is better than whom.

    methods:    "POLICY/ALLOCATOR", "POLICY" (under uniform), a plan file, "POLICY/PLAN", or "quantized/int4" (int2,
                fp8, kivi4, kivi2); with parameters, "POLICY(NAME=JSON, ...)"; in a format, "snapkv@int4", with as many
                entries as take the bytes of the others. The controls are always added: the full cache, entries kept at
                random, uniform budgets under each policy, and budgets shuffled over the KV heads
    task:       what to measure: "perplexity", or a registered task such as "passkey", "ruler/vt", "longbench/trec"
    question:   of a task: "aware" compresses a context with its question, "agnostic" before the question comes
    data:       the folder of a task's files; without it LongBench's are the Hub's
    task_file:  a JSONL file of your own, rows of context, question and answers, in place of a task's name
    retention:  kept fractions, each in (0, 1); None for 0.5, 0.3, 0.1
    text:       a UTF-8 file; None for Python's language reference. A task needs none
    context:    tokens of one sequence or prompt
    prefill:    tokens of the prompt that is compressed; 0 decodes from the first token on, None is half
    part:       of the text: "heldout", or "whole" for a text that no plan was tuned on
    limit:      most sequences or samples to measure
    seed:       of the bootstrap, the shuffled rows and the prompts
    out:        the rows as JSON; a table beside it as .md, and what each sample of a task gave as .samples.jsonl. Rows
                and samples that the files already have are not measured again
    png:        draw quality over bytes, and a bar for each row
    html:       write a report as one file that needs no network
    model:      a Hub id, a directory, a .gguf file, or the built-in smollm2-135m
    batch_size: sequences in one forward
    no_timing:  do not time decoding, as while others use the device

    A method that fails is a row that says why. Raises `BudgetError`, `KVPolicyError` (also for a file that was made
    under other settings), `ModelError`, `PlanError`, `PluginError`, `TextError`.
    """
    names = [str(method) for method in arguments.several(methods)]
    subject = chosen_task(task, question=question, data=data, task_file=task_file)
    _check(subject, names, context, prefill, part)
    arguments.check_least(LEAST_SEQUENCES, limit=limit)
    arguments.check_least(1, batch_size=batch_size)
    retentions = [_below_one(r) for r in arguments.several(retention) or RETENTIONS]
    rows, picture, report = Path(out), arguments.optional_path(png), arguments.optional_path(html)
    source = arguments.optional_path(text)
    page = rows.with_suffix(".md")
    if page == rows:
        raise KVPolicyError(f"out= is the JSON file, and {page} its table: give another name than {rows}")
    for path in (rows, page, picture, report):
        arguments.check_writable(path)
    from kvpolicy.comparison.methods import check_asked, read_asked, read_methods

    requests = read_asked(names)
    check_asked(requests, retentions, prefill)
    arguments.check_text(source)
    where = arguments.pick_device(device)
    number = arguments.pick_dtype(dtype, where)

    chosen, progress = read_methods(names), progress or Progress()
    with progress.wait(f"loading {model}"):
        from kvpolicy.comparison import run
        from kvpolicy.integrations.transformers import load_model, read_corpus, weights_sha256

        network, tokenizer = load_model(str(model), revision=revision, device=where, dtype=number)
    number = str(network.dtype).removeprefix("torch.")
    made: Task
    about: dict[str, Any] = {}
    settings = {"weights": weights_sha256(network), "dtype": number, "kvpolicy": version("kvpolicy")}
    if task in RETRIEVAL and question == "aware":
        made = _questions(task, network, tokenizer, context, limit, batch_size, seed)
    elif subject is not None:
        sizes: dict[str, Any] = {"limit": limit, "context": context, "seed": seed, "batch_size": batch_size}
        sizes |= {"records": rows.with_suffix(".samples.jsonl"), "settings": settings, "progress": progress}
        made = subject.of_model(network, tokenizer, **sizes)
        if made.count < LEAST_SEQUENCES:
            raise TextError(f"{subject.name} has {made.count} sample here: {LEAST_SEQUENCES} are needed to compare")
    else:
        corpus = _unseen(read_corpus(tokenizer, source), part, chosen)
        made, about = _text_task(network, tokenizer, corpus, part, context, prefill, limit, batch_size)
    about |= {"model": str(model), "measured": made.described, "sequences": made.count, "dtype": number}
    options: dict[str, Any] = {"settings": settings, "about": about, "timing": not no_timing, "progress": progress}
    try:
        comparison = run.compare(made, chosen, retentions, rows, seed=seed, **options)
    except KeyboardInterrupt:
        progress.note(f"interrupted; rows that were measured are in {rows}: the same comparison goes on from there")
        raise
    _write(comparison, page, picture, report)
    requested = {method.name for method in requests}
    failed = [row for row in comparison.rows.values() if row.error is not None and row.method in requested]
    return SideBySide(comparison, tuple(failed), rows, page)


def _check(task: ChosenTask | None, names: list[str], context: int, prefill: int | None, part: str) -> None:
    if not names:
        raise KVPolicyError("name the methods to compare: methods=POLICY/ALLOCATOR or a plan file, one or several")
    arguments.check_context(context)
    arguments.check_least(0, prefill=prefill)
    if part not in PARTS:
        raise KVPolicyError(f"part= must be {' or '.join(PARTS)}, got '{part}'")
    if task is not None and prefill is not None:
        raise BudgetError(f"prefill= goes with perplexity: the prompts of {task.name} are compressed whole")


def _below_one(retention: float) -> float:
    if arguments.check_retention(retention) == 1:
        raise BudgetError("retention=1 keeps everything: the full cache is always compared, give fractions below 1")
    return retention


def _questions(
    name: str, network: Any, tokenizer: Any, context: int, limit: int, batch_size: int, seed: int
) -> RetrievalTask:
    """Raises `TextError` for a context without room."""
    from kvpolicy.comparison.task import RetrievalTask
    from kvpolicy.tasks.questions import make_key_values, make_passkeys

    make = make_passkeys if name == "passkey" else make_key_values
    return RetrievalTask(name, network, tokenizer, make(tokenizer, limit, context, seed), batch_size=batch_size)


def _unseen(corpus: Corpus, part: str, methods: Sequence[Method]) -> Corpus:
    """The corpus itself. Raises `TextError` where the whole of it is asked for and a plan was tuned on it."""
    tuned_on = {method.plan.provenance.get("text_sha256") for method in methods if method.plan is not None}
    if part == "whole" and corpus.sha256 in tuned_on:
        raise TextError(
            f"part=whole: a plan was tuned on a part of {corpus.name}; leave part= out, or give another text="
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
    about = {"text": corpus.name if part == "whole" else f"{corpus.name}, held-out part"}
    if prefill == 0:
        return DecodingTask(network, sequences, batch_size=batch_size), about
    options = {"prefill_length": prefill, "batch_size": batch_size, "tokenizer": tokenizer}
    return PerplexityTask(network, sequences, **options), about


def _write(comparison: Comparison, page: Path, png: Path | None, html: Path | None) -> None:
    """The table, the picture, and the report."""
    from kvpolicy.report.comparison_tables import markdown

    write_bytes(page, markdown(comparison).encode())
    if png is not None:
        from kvpolicy.report.comparison_figure import comparison_png

        write_bytes(png, comparison_png(comparison))
    if html is not None:
        from kvpolicy.report.comparison_html import comparison_html

        write_bytes(html, comparison_html(comparison).encode())
