"""`kvpolicy tune`: profile, search per retention, check on held-out text, write the plan."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvpolicy.cli import options as opt
from kvpolicy.cli.watch import watcher
from kvpolicy.defaults import CONTEXT, MODEL, RETENTIONS
from kvpolicy.errors import BudgetError, StudyError
from kvpolicy.files.regular import write_bytes
from kvpolicy.plugins.params import parse_params

if TYPE_CHECKING:
    from kvpolicy.budget.plan import BudgetPlan


def tune_command(
    model: opt.Model = MODEL,
    estimator: Annotated[str, typer.Option(help="Importance estimator.")] = "cosine",
    allocator: Annotated[str, typer.Option(help="Budget allocator, which turns importance into budgets.")] = "baklava",
    policy: Annotated[str, typer.Option(help="Eviction policy.")] = "streaming",
    param: opt.Params = None,
    allocator_param: opt.AllocatorParams = None,
    policy_param: opt.PolicyParams = None,
    objective: Annotated[
        str,
        typer.Option(
            help="What the search goes by: perplexity, retrieval, mixed, or task:NAME, the answers of a task."
        ),
    ] = "perplexity",
    question: opt.Question = "aware",
    data: opt.Data = None,
    task_file: opt.TaskFile = None,
    retention: Annotated[list[float] | None, opt.retentions("0.5, 0.3, 0.1; with --max-loss 0.9, 0.8, ... 0.1")] = None,
    memory: Annotated[
        list[float] | None,
        typer.Option(
            help="Instead of --retention: a part of the full cache's bytes, everything counted, as 0.15; repeatable.",
            show_default=False,
        ),
    ] = None,
    format: Annotated[
        str,
        typer.Option(
            help="Format of the entries that are searched for: int8, int4, auto (one for each layer), or model."
        ),
    ] = "model",
    max_loss: Annotated[
        float | None,
        typer.Option(
            help="Stop at the smallest cache whose held-out loss is at most this part (0.02) above the full cache's.",
            show_default=False,
        ),
    ] = None,
    text: opt.Text = None,
    context: opt.Context = CONTEXT,
    prefill: Annotated[int | None, opt.prefills("")] = None,
    sequences: Annotated[int, typer.Option(min=1, help="Sequences of the text in each trial.")] = 4,
    trials: Annotated[
        int | None,
        typer.Option(min=1, help="Trials of each level; default: as many as fit into about 200 s.", show_default=False),
    ] = None,
    seed: opt.Seed = 0,
    sampler: Annotated[str, typer.Option(help="tpe (multivariate) or gp.")] = "tpe",
    storage: Annotated[
        str | None,
        typer.Option(
            help="Where trials are kept: a file, an Optuna storage URL, or grpc://host:port. Default: beside --out.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue the search beside --out that has these settings; without this switch a new one begins.",
        ),
    ] = False,
    out: Annotated[Path, typer.Option(help="Where the plan is written; the study's journal lies beside it.")] = Path(
        "plan.json"
    ),
    html: Annotated[
        Path | None,
        typer.Option(help="Write a report as one HTML file, with what is kept of a prompt.", show_default=False),
    ] = None,
    device: opt.Device = "auto",
    dtype: opt.DType = "auto",
    revision: opt.Revision = None,
    batch_size: opt.BatchSize = 1,
    config: opt.Config = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Search per-head budgets for a model on a text, and write them as a plan.

    Profiles the model once, then runs one Optuna study for each --retention (default 0.5, 0.3, 0.1) and reports the
    result on a part of the text that the search never saw. By default a trial is measured by perplexity: under the
    window rule, that of decoding from the first token on; under any other policy, that of the text behind a prompt,
    which the policy compresses once. The plan records the policy.

    A policy that names parameters to search is searched first, once for all levels, under uniform budgets at the
    smallest retention; with any --policy-param it is used as it is.

    --memory 0.15 searches for a part of the full cache's bytes instead of its entries (as of 16-bit numbers, unless
    there is a --dtype), and --format int4 for entries of 4 bits, which every trial is measured with: the plan says so,
    and whatever runs it keeps entries so. --format auto chooses one for each layer, by --estimator fisher.

    --objective retrieval measures a trial by the loss on the answers to prompts that hold a fact somewhere and ask
    for it; mixed gives text and answers half of the weight each; task:NAME and --task-file take the answers to a task's
    questions, some of which are held out. --max-loss 0.02 goes down the retentions and stops
    at the first whose held-out loss may be more than 2 % above the full cache's: the plan holds those before it.
    """
    from kvpolicy.plugins.registry import registry
    from kvpolicy.verbs import arguments

    if memory and retention:
        raise BudgetError("--memory and --retention were given: give one of them")
    if sampler not in ("tpe", "gp"):
        raise StudyError(f"--sampler must be tpe or gp, got '{sampler}'")
    registry.get("estimator", estimator)
    registry.get("allocator", allocator)
    registry.get("policy", policy)
    for path in (out, html):
        arguments.check_writable(path)
    arguments.check_text(text)
    arguments.check_text(task_file)
    if task_file is not None and (data is not None or objective != "perplexity"):
        raise StudyError("--task-file is an objective of its own: leave --objective and --data out")
    progress = watcher(quiet)
    with progress.wait(f"loading {model}"):  # the imports alone take seconds
        from kvpolicy.budget.plan import save_plan
        from kvpolicy.integrations.transformers import load_model, read_corpus
        from kvpolicy.tuning import TuneSettings, tune
        from kvpolicy.tuning.search_method import SearchMethod
        from kvpolicy.tuning.settings import MAX_LOSS_RETENTIONS, OF_FILE
        from kvpolicy.tuning.storage_url import shown

        settings = TuneSettings(
            estimator=estimator,
            estimator_params=parse_params(param, "--param"),
            allocator=allocator,
            allocator_params=parse_params(allocator_param, "--allocator-param"),
            policy=policy,
            policy_params=parse_params(policy_param, "--policy-param"),
            retentions=tuple(retention or (MAX_LOSS_RETENTIONS if max_loss is not None and not memory else RETENTIONS)),
            memories=tuple(memory or ()),
            format=format,
            objective=objective if task_file is None else OF_FILE,
            question=question,
            data=data if task_file is None else task_file,
            max_loss=max_loss,
            sequences=sequences,
            context_length=context,
            prefill_length=prefill,
            trials=trials,
            seed=seed,
            sampler=sampler,  # type: ignore[arg-type]  # checked above
            batch_size=batch_size,
            out=out,
            storage=storage or out.with_name(out.name + ".study"),
            resume=resume,
            choose_dtype=dtype == "auto",
        )
        SearchMethod.from_settings(settings)  # refuses what it can before a model is loaded
        where = arguments.pick_device(device)
        loaded, tokenizer = load_model(model, revision=revision, device=where, dtype=arguments.pick_dtype(dtype, where))
    progress.note(f"{model} from {loaded.kvpolicy_source}, on {where}")
    with progress.wait("reading the text"):
        corpus = read_corpus(tokenizer, text)
    try:
        plan = tune(loaded, corpus, settings, model_id=model, revision=revision, progress=progress)
    except KeyboardInterrupt:
        progress.note(
            f"interrupted; the study is kept in {shown(settings.storage)}: run the same command with --resume to go on"
        )
        raise
    save_plan(plan, out)
    if html is not None:
        from kvpolicy.report.html import plan_html
        from kvpolicy.verbs.kept_sample import kept_sample

        write_bytes(html, plan_html(plan, kept_sample(loaded, tokenizer, corpus, plan)).encode())
    _report(plan, out, json)


def _report(plan: BudgetPlan, out: Path, as_json: bool) -> None:
    if as_json:
        shown = ("retention", "formats", "perplexity", "comparison", "retrieval")
        levels = [{name: getattr(level, name) for name in shown} for level in plan.levels]
        names = ("objective", "protocol", "prefill_length", "passkey", "max_loss", "memory", "calibration")
        how = {"policy": plan.method.policy.name} | {x: plan.provenance[x] for x in names if x in plan.provenance}
        opt.print_json({"plan": str(out), "model": plan.model.id, **how, "levels": levels})
        return
    from kvpolicy.cli.terminal import Console, say
    from kvpolicy.report.tables import facts_table, levels_table, warnings_of
    from kvpolicy.tuning.loss_limit import limit_sentence

    console = Console()
    console.print(levels_table(plan))
    if (facts := facts_table(plan)) is not None:
        console.print(facts)
    if "max_loss" in plan.provenance:
        console.print(limit_sentence(plan.provenance["max_loss"]), soft_wrap=True)
    for line in warnings_of(plan):
        say(line)
    message = f"plan written to {out}; look at it with: {opt.program()} show {shlex.quote(str(out))}"
    console.print(message, soft_wrap=True)
