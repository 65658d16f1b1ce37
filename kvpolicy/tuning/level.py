"""One retention: search the allocator's parameters, check what was found on the held-out text."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import optuna
import torch
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import WilcoxonPruner
from torch import Tensor

from kvpolicy.budget.apportion import apportion
from kvpolicy.budget.plan import PlanLevel, kept_fractions
from kvpolicy.errors import ModelError
from kvpolicy.measure.evaluation import perplexity
from kvpolicy.measure.stats import PairedDifference, paired_difference, relative_increase
from kvpolicy.model.spec import Budget, Importance, ModelSpec
from kvpolicy.plugins import plugin_call
from kvpolicy.plugins.registry import registry
from kvpolicy.plugins.roles import BudgetAllocator
from kvpolicy.progress import Progress
from kvpolicy.tuning.costs import metered
from kvpolicy.tuning.fit import fitted_shares
from kvpolicy.tuning.known_losses import known_losses
from kvpolicy.tuning.probes import Losses, Probes
from kvpolicy.tuning.search import CHUNKS, chunk_parts, run_trials, stopped_trials
from kvpolicy.tuning.settings import TuneSettings
from kvpolicy.tuning.study_notes import StudyNotes


@dataclass(frozen=True, slots=True)
class Job:
    """Everything a level needs."""

    settings: TuneSettings
    spec: ModelSpec
    allocator: type[BudgetAllocator]
    importance: Importance
    search: Probes
    heldout: Probes
    heldout_full: Losses
    trials: int
    progress: Progress

    def budget(self, retention: float, context: int) -> Budget:
        floor = min(self.search.target.least_capacity, context)
        total = max(self.spec.total_entries(retention, context), floor * self.importance.per_head.numel())
        return Budget(total=total, shape=self.spec.table_shape, floor=floor, ceiling=context)

    def table(self, shares: Tensor, retention: float, context: int) -> Tensor:
        """Capacities `[L, H]` of a context."""
        return _table(shares, self.budget(retention, context))


def search_level(job: Job, study: optuna.Study, retention: float) -> PlanLevel:
    """Searches one level and checks what was found on the held-out text."""
    notes = StudyNotes(study)
    with metered(job.search.text.model, partial(notes.keep_cost, "search")):
        found = _found(job, study, retention)
    return _checked(job, study, retention, found)


@dataclass(frozen=True, slots=True, eq=False)
class _Chosen:
    """params: None means that uniform was kept;  loss, uniform_loss: the objective's on the search's sequences"""

    shares: Tensor
    params: dict[str, Any] | None
    loss: float
    uniform_loss: float

    def as_uniform(self) -> _Chosen:
        return _Chosen(torch.ones_like(self.shares), None, self.uniform_loss, self.uniform_loss)


def _found(job: Job, study: optuna.Study, retention: float) -> _Chosen:
    """The best of the trials, or uniform."""
    target, uniform, notes = job.search.target, torch.ones(job.spec.table_shape), StudyNotes(study)
    budget = job.budget(retention, target.context_length)
    learned = fitted_shares(fitting(job.settings), target, job.importance, budget, notes, job.progress)
    trials = job.trials if learned is None else 1
    job.progress.begin(f"search {retention:.0%}", trials)
    study.pruner = _pruner()

    @cache  # not needed where all trials are done
    def reference() -> list[Tensor]:
        return _uniform_parts(job, notes, _table(uniform, budget))

    def shares_of(candidate: BudgetAllocator) -> Tensor:
        return plugin_call.shares(candidate, job.importance, budget) if learned is None else learned

    def evaluate(candidate: BudgetAllocator) -> Iterable[Tensor]:
        return target.token_losses(_table(shares_of(candidate), budget))

    try:
        found = run_trials(
            study,
            job.allocator,
            evaluate,
            reference,
            trials=trials,
            seed=job.settings.seed,
            sampler=job.settings.sampler,
            progress=job.progress,
        )
    finally:
        job.progress.end()
    if learned is not None:
        notes.keep_fitted_shares(learned)
    loss = notes.uniform_loss
    if loss is None:
        loss = _mean_loss(reference())
    if found is None or found.excess >= 0:
        return _Chosen(uniform, None, loss, loss)
    params = found.params if learned is None else plugin_call.params_of(fitting(job.settings))
    chosen = registry.create("allocator", job.settings.allocator, params)
    return _Chosen(shares_of(chosen), params, loss + found.excess, loss)


def _uniform_parts(job: Job, notes: StudyNotes, table: Tensor) -> list[Tensor]:
    """`chunk_parts` of the uniform table on the search's sequences. The study keeps their mean loss."""
    parts = list(chunk_parts(job.search.target.token_losses(table)))
    loss = _mean_loss(parts)
    if not math.isfinite(loss):
        raise ModelError(
            f"the model's loss on the search text is not finite in {job.search.text.model.dtype}: try another dtype="
        )
    notes.keep_uniform_loss(loss)
    return parts


def _mean_loss(parts: list[Tensor]) -> float:
    return float(torch.cat([part.sum(1) for part in parts]).mean())


def learns(allocator: type[BudgetAllocator]) -> bool:
    """Whether it learns shares from the model instead of being searched."""
    return allocator.fit is not BudgetAllocator.fit


def fitting(settings: TuneSettings) -> BudgetAllocator:
    """The allocator as it learns."""
    made: BudgetAllocator = registry.create("allocator", settings.allocator, settings.allocator_params)
    return made


def _checked(job: Job, study: optuna.Study, retention: float, found: _Chosen) -> PlanLevel:
    """The level with its held-out figures."""
    progress, full, notes = job.progress, job.heldout_full, StudyNotes(study)
    beats = found.params is not None
    progress.begin(f"held-out text {retention:.0%}", 2)
    uniform = _losses(job, notes, "heldout", torch.ones(job.spec.table_shape), retention)
    progress.advance()
    losses = _losses(job, notes, "heldout", found.shares, retention) if beats else uniform
    progress.advance()
    progress.end()
    difference = paired_difference(losses.target, uniform.target, job.settings.seed)
    progress.note(_summary(job.settings.objective, retention, beats, losses, uniform, full, difference))
    kept, veto = "uniform kept: no trial beat it", {}
    if difference.mean > 0:  # a veto, and no choice: the held-out text still has no say in which trial is taken
        kept, veto = "uniform kept: the held-out text vetoed the search", {"veto": _figures(difference)}
        found, losses, beats = found.as_uniform(), uniform, False
        difference = paired_difference(losses.target, uniform.target, job.settings.seed)
    search = _search_losses(job, notes, retention, found)
    return PlanLevel(
        retention=retention,
        shares=kept_fractions(found.shares, retention),
        allocator_params=found.params or {},
        perplexity={
            "search": perplexity(search.text),
            "heldout": perplexity(losses.text),
            "heldout_full": perplexity(full.text),
            "heldout_uniform": perplexity(uniform.text),
        },
        comparison={
            **_figures(difference),
            "verdict": f"{difference.verdict} uniform" if beats else kept,
            **veto,
            "trials_stopped_early": stopped_trials(study),
            "loss_over_full": _over_full(job.settings, losses, full),
        },
        retrieval=_answers(search, losses, full, uniform),
    )


def _figures(difference: PairedDifference) -> dict[str, Any]:
    return {
        "loss_minus_uniform": difference.mean,
        "interval": [difference.low, difference.high],
        "n": difference.n,
    }


def _search_losses(job: Job, notes: StudyNotes, retention: float, found: _Chosen) -> Losses:
    """Text and answers apart; the objective "perplexity" has measured the one that there is."""
    if job.settings.objective == "perplexity":
        loss = torch.tensor([found.loss], dtype=torch.float64)
        return Losses(loss, None, loss)
    return _losses(job, notes, "search", found.shares, retention)


def _losses(
    job: Job, notes: StudyNotes, part: Literal["search", "heldout"], shares: Tensor, retention: float
) -> Losses:
    probes = job.search if part == "search" else job.heldout
    return known_losses(notes, part, probes, lambda context: job.table(shares, retention, context))


def _answers(search: Losses, losses: Losses, full: Losses, uniform: Losses) -> dict[str, Any]:
    """Mean losses of the answers' tokens; nothing where there were no needle prompts."""
    measured = {"search": search, "heldout": losses, "heldout_full": full, "heldout_uniform": uniform}
    means = {name: float(each.answers.mean()) for name, each in measured.items() if each.answers is not None}
    return {"answer_loss": means} if means else {}


def _over_full(settings: TuneSettings, losses: Losses, full: Losses) -> dict[str, Any]:
    """The relative increase of the held-out loss that a limit is about: the answers' under the objective "retrieval",
    else the text's.
    """
    ours, base = losses.text, full.text
    if settings.objective == "retrieval" and losses.answers is not None and full.answers is not None:
        ours, base = losses.answers, full.answers
    increase, low, high = relative_increase(ours, base, settings.seed)
    return {"increase": increase, "interval": [low, high], "n": len(base)}


def _table(shares: Tensor, budget: Budget) -> Tensor:
    """Capacities `[L, H]`, through the same two steps as `BudgetPlan.capacities`."""
    retention = budget.total / (budget.shape[0] * budget.shape[1] * int(budget.ceilings().max()))
    return apportion(kept_fractions(shares, retention), budget)


def _summary(
    objective: str,
    retention: float,
    beats: bool,
    losses: Losses,
    uniform: Losses,
    full: Losses,
    difference: PairedDifference,
) -> str:
    figures = (
        f"{retention:.0%} kept: held-out perplexity {perplexity(losses.text):.3f} (uniform "
        f"{perplexity(uniform.text):.3f}, full {perplexity(full.text):.3f})"
    )
    if losses.answers is not None and uniform.answers is not None and full.answers is not None:
        figures += (
            f", answer loss {float(losses.answers.mean()):.4f} (uniform {float(uniform.answers.mean()):.4f}, full "
            f"{float(full.answers.mean()):.4f})"
        )
    if not beats:
        where = "on the search text" if objective == "perplexity" else "in the search"
        return f"{figures}; no trial beat uniform {where}, so the plan stores uniform"
    interval = f"loss {difference.mean:+.4f}, 95 % [{difference.low:+.4f}, {difference.high:+.4f}], n = {difference.n}"
    scored = "" if objective == "perplexity" else f" on {objective}"
    vetoed = ", so the plan stores uniform" if difference.mean > 0 else ""
    return f"{figures}; {difference.verdict} uniform{scored} ({interval}){vetoed}"


def _pruner() -> WilcoxonPruner:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        # two sequences at least: on one alone, chunks that are worse together say little about the others
        return WilcoxonPruner(p_threshold=0.1, n_startup_steps=2 * CHUNKS)
