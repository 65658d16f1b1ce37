"""Quality under a plan, at measured bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvpolicy.budget.ask import Ask
from kvpolicy.budget.entries import capacities, context_budget, unmeasured_capacities
from kvpolicy.budget.entry_format import Format, format_of, name_of
from kvpolicy.budget.plan import BudgetPlan, load_plan
from kvpolicy.budget.plan_warnings import warn_if_other_policy
from kvpolicy.defaults import CONTEXT
from kvpolicy.errors import BudgetError, KVPolicyError, PlanError
from kvpolicy.files.regular import write_bytes
from kvpolicy.plugins.registry import registry
from kvpolicy.progress import Progress
from kvpolicy.verbs import arguments
from kvpolicy.verbs.cache_choice import check_level, chosen_policy, load_network
from kvpolicy.verbs.chosen_task import ChosenTask, chosen_task

if TYPE_CHECKING:
    from kvpolicy.integrations.transformers import SequenceProbe
    from kvpolicy.measure.evaluation import CacheBytes
    from kvpolicy.plugins.roles import EvictionPolicy


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was measured.

    plan:      the name that was asked for
    rows:      the full cache, then at each retention uniform budgets and the plan's, as JSON values
    described: the protocol, in words
    """

    plan: str
    rows: tuple[dict[str, Any], ...]
    described: str

    def to_json(self) -> dict[str, Any] | list[dict[str, Any]]:
        """What `kvpolicy eval --json` prints: an object for each retention, alone where there is one. Each has those
        beside it that it is compared with, the full cache and uniform budgets of its size.
        """
        documents = [self._document(row) for row in self.rows if row["plan"] == self.plan]
        return documents[0] if len(documents) == 1 else documents

    def _document(self, row: dict[str, Any]) -> dict[str, Any]:
        beside = {"full": 1.0, "uniform": row["retention"]}
        others = {(other["plan"], other["retention"]): other for other in self.rows if other is not row}
        return row | {name: others[name, kept] for name, kept in beside.items() if (name, kept) in others}


def eval(
    plan: str | Path = "full",
    *,
    task: str = "perplexity",
    question: str = "aware",
    data: str | Path | None = None,
    task_file: str | Path | None = None,
    records: str | Path | None = None,
    retention: float | Sequence[float] | None = None,
    policy: str | None = None,
    policy_param: Mapping[str, Any] | None = None,
    format: str | Format = None,
    model: str | Path | None = None,
    text: str | Path | None = None,
    context: int | None = None,
    prefill: int | None = None,
    limit: int = 8,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    batch_size: int = 1,
    png: str | Path | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measures quality and bytes: perplexity on the held-out part of a text, which `tune` never searches, or a task.

    Perplexity is exact for token-by-token decoding under the plan's capacities, and bytes are those of one real cache.
    The full cache and uniform budgets are measured beside the plan.

    plan:       a plan file, "uniform" or "full"
    task:       what to measure: "perplexity", or a registered task such as "passkey", "ruler/vt", "longbench/trec"
    question:   of a task: "aware" compresses a context with its question, "agnostic" before the question comes
    data:       the folder of a task's files; without it LongBench's are the Hub's
    task_file:  a JSONL file of your own, rows of context, question and answers, in place of a task's name
    records:    a JSONL file for what each sample gave; samples that it has already are not run again
    retention:  kept fractions, each in (0, 1]; None for the plan's levels. "uniform" needs some
    policy, policy_param: who evicts, and parameters over its own; None for the plan's, or streaming
    format:     of the entries of all but the full cache: "int8", "int4", "model" for the model's dtype; None for the
                plan's own, which uniform budgets get too
    model:      a Hub id, a directory, a .gguf file; None for the plan's, which is not downloaded
    text:       a UTF-8 file; None for Python's language reference. A task needs none
    context:    tokens of one sequence or prompt; None for the plan's, or 1024
    prefill:    tokens at the start that attend densely; None for the plan's, else none under a window rule, and half of
                the context under any other policy, which compresses them once
    limit:      most sequences or samples to measure
    seed:       of the bootstrap, which gives the interval, and of a task's samples
    dtype:      "auto" is the plan's own
    batch_size: sequences in one forward
    png:        draw the scores of a task by depth and length, such as those of "needle-grid"

    Raises `BudgetError`, `KVPolicyError`, `ModelError`, `PlanError`, `PluginError`, `TextError`.
    """
    chosen = chosen_task(task, question=question, data=data, task_file=task_file)
    name, source, lines = str(plan), arguments.optional_path(text), arguments.optional_path(records)
    picture = arguments.optional_path(png)
    _check_of_task(chosen, prefill, source, lines, picture)
    format_of(format)
    loaded = None if name in ("uniform", "full") else load_plan(name)
    evicting, evicts = chosen_policy(loaded, policy, policy_param)
    other = loaded is not None and warn_if_other_policy(loaded, evicts)
    if chosen is None and prefill is None and loaded is not None and not other and context is None:
        prefill = loaded.provenance.get("prefill_length")
    context = arguments.check_context(_own_context(loaded) if context is None else context)
    if prefill is not None and prefill >= context:
        raise BudgetError(f"prefill= must be below the context of {context} tokens, got {prefill}")
    arguments.check_least(0, prefill=prefill)
    arguments.check_least(1, limit=limit, batch_size=batch_size)
    retentions = _retentions(name, loaded, arguments.several(retention))
    arguments.check_text(source)
    where = arguments.pick_device(device)
    number = arguments.pick_dtype(_own_dtype(loaded) if dtype == "auto" else dtype, where)

    progress = progress or Progress()
    _, network, tokenizer = load_network(model, loaded, progress, revision=revision, device=where, dtype=number)
    from kvpolicy.integrations.transformers import read_corpus
    from kvpolicy.measure.evaluation import probe_for

    if chosen is not None:
        sizes = {"limit": limit, "context": context, "seed": seed, "batch_size": batch_size}
        subject = (network, tokenizer)
        files = (lines, picture)
        pairs = _pairs(name, loaded, retentions, format)
        return _answered(chosen, loaded, (evicting, evicts), pairs, subject, sizes, files, progress)
    corpus = read_corpus(tokenizer, source)
    count = max(1, min(limit, corpus.room("heldout", context)))
    sequences = corpus.sequences("heldout", count, context)
    options: dict[str, Any] = {"prefill_length": prefill, "batch_size": batch_size, "tokenizer": tokenizer}

    @cache
    def probe_under(entry_format: Format, shared: _Layers) -> SequenceProbe:
        own = options | {"entry_format": entry_format, "shared_layers": dict(shared)}
        return probe_for(evicts, network, sequences, **own)

    pairs = _pairs(name, loaded, retentions, format)
    probe = probe_under(pairs[-1][2], _shared(loaded, name))  # refuses here what it would refuse behind others
    if loaded is not None:
        loaded.check_model(probe.spec)
    facts = {"policy": evicting, "protocol": probe.protocol, "dtype": number}
    measured = _measured(probe_under, loaded, pairs, progress)
    return Evaluation(name, tuple(_row(measure, task, seed) | facts for measure in measured), probe.described)


_Pair = tuple[str, float, Format]
"""Who splits the budget ("full", "uniform", or the plan's name), what is kept, and the format of the entries."""

_Layers = tuple[tuple[int, int], ...]
"""Layers that share, as `PlanModel.shared_layers`."""


def _pairs(name: str, plan: BudgetPlan | None, retentions: list[float], format: str | Format) -> list[_Pair]:
    """What is measured: the full cache, and at each retention uniform budgets and the plan's."""
    if name == "full":
        return [("full", 1.0, format_of(format))]
    pairs: list[_Pair] = [("full", 1.0, None)]
    for kept in retentions:
        own = format_of(format) if plan is None or format is not None else plan.entry_format(Ask(kept))
        pairs += [(who, kept, own) for who in dict.fromkeys(("uniform", name))]
    return pairs


def _answered(
    chosen: ChosenTask,
    plan: BudgetPlan | None,
    policy: tuple[str, EvictionPolicy],
    pairs: list[_Pair],
    subject: tuple[Any, Any],
    sizes: dict[str, int],
    files: tuple[Path | None, Path | None],
    progress: Progress,
) -> Evaluation:
    """A registered task. subject: model and tokenizer;  files: records, picture;  sizes: the others"""
    from kvpolicy.integrations.transformers import weights_sha256
    from kvpolicy.verbs.eval_task import answer_rows, name_places

    (network, tokenizer), (records, picture) = subject, files
    number = str(network.dtype).removeprefix("torch.")
    settings = {"weights": weights_sha256(network), "dtype": number, "kvpolicy": version("kvpolicy")}
    options: dict[str, Any] = {**sizes, "records": records, "settings": settings, "progress": progress}
    task = chosen.of_model(network, tokenizer, **options)
    if picture is not None and not name_places(task.samples):
        raise KVPolicyError(f"png= draws scores by depth and length, which the samples of {task.name} do not name")
    facts = {"policy": policy[0], "dtype": number, "context_length": sizes["context"]}
    rows = answer_rows(task, plan, policy, pairs, seed=sizes["seed"], facts=facts, progress=progress)
    answer = Evaluation(pairs[-1][0], tuple(rows), task.described)
    if picture is not None:
        _draw(answer, picture)
    return answer


def _draw(answer: Evaluation, picture: Path) -> None:
    """The scores by depth and length."""
    from kvpolicy.report.depth_figure import depths_png
    from kvpolicy.report.depth_map import depth_maps

    first = answer.rows[0]
    title = f"{first['task']}, question-{first['question']}, under {first['policy']}"
    write_bytes(picture, depths_png(depth_maps(answer.rows), title, first["metric"]))


def _check_of_task(
    task: ChosenTask | None, prefill: int | None, text: Path | None, records: Path | None, picture: Path | None
) -> None:
    """Raises `BudgetError` and `KVPolicyError` for arguments of the other kind of task."""
    if task is not None and prefill is not None:
        raise BudgetError(f"prefill= goes with perplexity: the prompts of {task.name} are compressed whole")
    if task is not None and text is not None:
        raise KVPolicyError(f"text= goes with perplexity: {task.name} has prompts of its own")
    for option, path in (("records", records), ("png", picture)):
        if task is None and path is not None:
            raise KVPolicyError(f"{option}= goes with a task whose prompts have questions, not with perplexity")
        arguments.check_writable(path)


@dataclass(frozen=True, slots=True, eq=False)
class _Measured:
    """One table of capacities. losses: float64 `[n]`, one for each sequence"""

    probe: SequenceProbe
    plan: str
    retention: float
    losses: Tensor
    memory: CacheBytes


def _measured(
    probe_under: Callable[[Format, _Layers], SequenceProbe],
    plan: BudgetPlan | None,
    pairs: list[_Pair],
    progress: Progress,
) -> Iterator[_Measured]:
    from kvpolicy.measure.evaluation import measured_bytes, perplexity

    progress.begin("evaluate", len(pairs))
    try:
        for plan_name, kept, entry_format in pairs:
            probe = probe_under(entry_format, _shared(plan, plan_name))
            table = _table(plan_name, plan, probe, kept)
            losses = probe.loss(table)
            progress.advance(f"{plan_name}, {kept:.4g} kept: perplexity {perplexity(losses):.3f}")
            yield _Measured(probe, plan_name, kept, losses, measured_bytes(probe, table))
    finally:
        progress.end()


def _shared(plan: BudgetPlan | None, name: str) -> _Layers:
    """Which layers share, those of the plan beside uniform budgets too; none in the full cache."""
    return () if plan is None or name == "full" else plan.model.shared_layers


def _own_context(plan: BudgetPlan | None) -> int:
    return int(plan.provenance.get("context_length", CONTEXT)) if plan else CONTEXT


def _own_dtype(plan: BudgetPlan | None) -> str:
    """What a plan was tuned in: perplexities differ with the dtype, and `eval` gives the one that `tune` gave."""
    return str(plan.provenance.get("dtype", "auto")) if plan else "auto"


def _retentions(name: str, plan: BudgetPlan | None, retentions: list[float]) -> list[float]:
    """Those to measure. Raises `PlanError` or `BudgetError` for one that there is no table for."""
    if name == "full":
        if retentions:
            raise PlanError("eval full keeps everything; leave retention= out, or evaluate uniform")
        return [1.0]
    if plan is None and not retentions:
        raise PlanError("eval uniform needs retention=")
    if plan is not None and not retentions:
        return sorted(plan.retentions, reverse=True)
    for kept in map(arguments.check_retention, retentions):
        if plan is not None:
            check_level(plan, kept)
    return retentions


def _table(name: str, plan: BudgetPlan | None, probe: SequenceProbe, retention: float) -> Tensor:
    """Capacities `[L, H]`."""
    spec, context = probe.spec, probe.context_length
    if name == "full":
        return torch.full(spec.table_shape, context)
    if plan is not None and name != "uniform":
        table = plan.capacities(context_length=context, retention=retention)
        if probe.entry_format is None:
            return table
        return capacities(table.double(), int(table.sum()), context, probe.least_capacity)
    total = spec.total_entries(retention, context)
    budget = context_budget(total, spec.table_shape, context, probe.least_capacity)
    return unmeasured_capacities(registry.create("allocator", "uniform"), budget)


def _row(measured: _Measured, task: str, seed: int) -> dict[str, Any]:
    from kvpolicy.measure.evaluation import perplexity
    from kvpolicy.measure.stats import mean_interval

    probe, losses, memory = measured.probe, measured.losses, measured.memory
    length = int(probe.sequences.shape[1])
    return {
        "task": task,
        "plan": measured.plan,
        "retention": measured.retention,
        "format": name_of(probe.entry_format),
        "perplexity": perplexity(losses),
        "interval": [math.exp(bound) for bound in mean_interval(losses, seed)],
        "loss": float(losses.mean()),
        "n": len(losses),
        "scored_tokens": len(losses) * (length - probe.first_scored),
        "context_length": length,
        "prefill_length": probe.prefill_length,
        "bytes": memory.bytes,
        "dense_bytes": memory.dense_bytes,
        "entries": memory.entries,
    }
