"""`kvpolicy eval`: quality under a plan, at measured bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from torch import Tensor

from kvpolicy.budget.apportion import apportion
from kvpolicy.budget.plan import BudgetPlan, load_plan
from kvpolicy.cli import cache_options
from kvpolicy.cli import options as opt
from kvpolicy.cli.watch import watcher
from kvpolicy.errors import BudgetError, KVPolicyError, PlanError
from kvpolicy.model.spec import Budget
from kvpolicy.progress import Progress

if TYPE_CHECKING:
    from kvpolicy.integrations.transformers import TransformersProbe
    from kvpolicy.measure.evaluation import CacheBytes

TASKS = ("perplexity",)


def evaluate(
    plan: Annotated[str, typer.Argument(help="A plan file, or: uniform, full.", show_default=False)] = "full",
    task: Annotated[str, typer.Option(help="What to measure: perplexity.")] = "perplexity",
    retention: Annotated[list[float] | None, opt.retentions("the plan's levels; needed for uniform")] = None,
    policy: cache_options.Policy = None,
    policy_param: opt.PolicyParams = None,
    model: Annotated[
        str | None, typer.Option(help="As for tune; default: the plan's model.", rich_help_panel="Model")
    ] = None,
    text: opt.Text = None,
    context: Annotated[int | None, typer.Option(help="Tokens of one sequence; default: the plan's, or 1024.")] = None,
    prefill: Annotated[int | None, opt.prefills("the plan's; without one ")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Sequences at most.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    device: opt.Device = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            help="auto, float32, bfloat16, float16; auto: a plan's own.",
            rich_help_panel="Model",
        ),
    ] = "auto",
    revision: opt.Revision = None,
    batch_size: opt.BatchSize = 1,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Measure quality and bytes on the held-out part of a text (the part that tune never searches).

    Perplexity is exact for token-by-token decoding under the plan's capacities. Under the window rule all tokens are
    decoded so, and those past the first quarter of each sequence are scored. Under any other policy the first --prefill
    tokens are a prompt, which is compressed once; what follows is kept on top of the capacities (decode="append") and
    scored. Bytes are those of one real cache, filled with one sequence or one prompt. The output names the protocol;
    figures of two protocols cannot be compared. The full cache and uniform budgets are measured beside the plan.
    """
    if task not in TASKS:
        raise KVPolicyError(f"no task named '{task}'; there is: {', '.join(TASKS)}")
    loaded = None if plan in ("uniform", "full") else load_plan(plan)
    if plan == "full" and retention:
        raise PlanError("eval full keeps everything; leave --retention out, or evaluate uniform")
    evicting, evicts = cache_options.chosen_policy(loaded, policy, policy_param)
    other = loaded is not None and loaded.warn_if_other_policy(evicts)
    if prefill is None and loaded is not None and not other and context is None:
        prefill = loaded.provenance.get("prefill_length")
    context = opt.check_context(_own_context(loaded) if context is None else context)
    if prefill is not None and prefill >= context:
        raise BudgetError(f"--prefill must be below the context of {context} tokens, got {prefill}")
    retentions = [opt.check_retention(r) for r in (retention or _default_retentions(plan, loaded))]
    if loaded is not None:
        for kept in retentions:
            cache_options.check_level(loaded, kept)
    opt.check_text(text)
    where = opt.pick_device(device)
    number = opt.pick_dtype(_own_dtype(loaded) if dtype == "auto" else dtype, where)

    from kvpolicy.integrations.transformers import read_corpus
    from kvpolicy.measure.evaluation import probe_for

    progress = watcher(quiet)
    _, network, tokenizer = cache_options.load_network(model, loaded, revision=revision, device=where, dtype=number)
    corpus = read_corpus(tokenizer, text)
    count = max(1, min(limit, corpus.room("heldout", context)))
    sequences = corpus.sequences("heldout", count, context)
    probe = probe_for(evicts, network, sequences, prefill_length=prefill, batch_size=batch_size, tokenizer=tokenizer)
    if loaded is not None:
        loaded.check_model(probe.spec)
    facts = {"policy": evicting, "protocol": probe.protocol, "dtype": number}
    measured = _measured(probe, plan, loaded, retentions, progress)
    rows = [_row(probe, each, task, seed) | facts for each in measured]
    _report(rows, plan, probe.described, json)


@dataclass(frozen=True, slots=True, eq=False)
class _Measured:
    """One table of capacities. losses: float64 `[n]`, one for each sequence"""

    plan: str
    retention: float
    losses: Tensor
    held: CacheBytes


def _measured(
    probe: TransformersProbe, name: str, plan: BudgetPlan | None, retentions: list[float], progress: Progress
) -> Iterator[_Measured]:
    """The full cache, and at each retention uniform budgets and the plan's."""
    from kvpolicy.measure.evaluation import measured_bytes, perplexity

    asked = [("full", 1.0)]
    if name != "full":
        asked += [(each, kept) for kept in retentions for each in dict.fromkeys(("uniform", name))]
    progress.begin("evaluate", len(asked))
    try:
        for each, kept in asked:
            table = _table(each, plan, probe, kept)
            losses = probe.loss(table)
            progress.advance(f"{each}, {kept:.4g} kept: perplexity {perplexity(losses):.3f}")
            yield _Measured(each, kept, losses, measured_bytes(probe, table))
    finally:
        progress.end()


def _own_context(plan: BudgetPlan | None) -> int:
    return int(plan.provenance.get("context_length", opt.DEFAULT_CONTEXT)) if plan else opt.DEFAULT_CONTEXT


def _own_dtype(plan: BudgetPlan | None) -> str:
    """What a plan was tuned in: perplexities differ with the dtype, and `eval` gives the one that `tune` gave."""
    return str(plan.provenance.get("dtype", "auto")) if plan else "auto"


def _default_retentions(name: str, plan: BudgetPlan | None) -> list[float]:
    if plan is not None:
        return sorted(plan.retentions, reverse=True)
    if name == "full":
        return [1.0]
    raise PlanError("eval uniform needs --retention")


def _table(name: str, plan: BudgetPlan | None, probe: TransformersProbe, retention: float) -> Tensor:
    """Capacities `[L, H]`."""
    spec, context = probe.spec, probe.context_length
    if name == "full":
        return torch.full(spec.table_shape, context)
    if plan is not None and name != "uniform":
        return plan.capacities(context_length=context, retention=retention)
    floor = probe.least_capacity
    total = max(spec.total_entries(retention, context), floor * spec.num_budgeted_layers * spec.num_kv_heads)
    return apportion(torch.ones(spec.table_shape), Budget(total, spec.table_shape, floor, context))


def _row(probe: TransformersProbe, measured: _Measured, task: str, seed: int) -> dict[str, Any]:
    from kvpolicy.measure.evaluation import perplexity
    from kvpolicy.measure.stats import mean_interval

    losses, length, held = measured.losses, int(probe.sequences.shape[1]), measured.held
    return {
        "task": task,
        "plan": measured.plan,
        "retention": measured.retention,
        "perplexity": perplexity(losses),
        "interval": [math.exp(bound) for bound in mean_interval(losses, seed)],
        "loss": float(losses.mean()),
        "n": len(losses),
        "scored_tokens": len(losses) * (length - probe.first_scored),
        "context_length": length,
        "prefill_length": probe.prefill_length,
        "bytes": held.bytes,
        "dense_bytes": held.dense_bytes,
        "entries": held.entries,
    }


def _report(rows: list[dict[str, Any]], plan: str, described: str, as_json: bool) -> None:
    if as_json:
        documents = [_document(row, rows) for row in rows if row["plan"] == plan]
        opt.print_json(documents[0] if len(documents) == 1 else documents)
        return
    from rich.table import Table

    from kvpolicy.cli.terminal import Console

    table = Table("plan", "kept", "perplexity", "95 %", "MB", "of full, MB", "n")
    for row in rows:
        table.add_row(
            row["plan"],
            f"{row['retention']:.4g}",
            f"{row['perplexity']:.3f}",
            "{:.3f} to {:.3f}".format(*row["interval"]),
            f"{row['bytes'] / 1e6:.2f}",
            f"{row['dense_bytes'] / 1e6:.2f}",
            str(row["n"]),
        )
    console = Console()
    console.print(table)
    said = f"measured under {rows[0]['policy']}: {described}; in {rows[0]['dtype']}"
    console.print(said, soft_wrap=True)


def _document(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A row with those that it is compared with: the full cache, and uniform budgets of its size."""
    beside = {"full": 1.0, "uniform": row["retention"]}
    others = {(each["plan"], each["retention"]): each for each in rows if each is not row}
    return row | {name: others[name, kept] for name, kept in beside.items() if (name, kept) in others}
