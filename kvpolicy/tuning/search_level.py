"""One retention: the allocator's parameters, searched or learned, against uniform capacities."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import optuna
import torch
from torch import Tensor

from kvpolicy.errors import ModelError
from kvpolicy.plugins import plugin_call
from kvpolicy.plugins.roles import BudgetAllocator
from kvpolicy.tuning.costs import metered
from kvpolicy.tuning.fit import fitted_shares
from kvpolicy.tuning.job import Job
from kvpolicy.tuning.search import chunk_parts, run_trials
from kvpolicy.tuning.study_notes import StudyNotes


@dataclass(frozen=True, slots=True, eq=False)
class SearchResult:
    """What a level's search settled on.

    shares: `[L, H]`;  params: the allocator's, None where uniform was kept
    loss, uniform_loss: the objective's on the search's sequences
    """

    shares: Tensor
    params: dict[str, Any] | None
    loss: float
    uniform_loss: float

    @property
    def beats_uniform(self) -> bool:
        return self.params is not None

    def as_uniform(self) -> SearchResult:
        return SearchResult(torch.ones_like(self.shares), None, self.uniform_loss, self.uniform_loss)


def search_level(job: Job, study: optuna.Study, level: float) -> SearchResult:
    """Runs what is still to be run of the level's study. What that cost is kept there."""
    notes = StudyNotes(study)
    with metered(job.search.text.model, partial(notes.keep_cost, "search")):
        return _search(job, study, notes, level)


def _search(job: Job, study: optuna.Study, notes: StudyNotes, level: float) -> SearchResult:
    target, uniform, method = job.search.target, torch.ones(job.spec.table_shape), job.method
    budget = job.budget(level, target.context_length)
    learned = None
    if method.learner is not None:  # which may still decline, and is then searched as any other
        learned = fitted_shares(method.learner, target, job.importance, budget, notes, job.progress)
    trials = job.trials if learned is None else 1  # measured as any trial is, so that uniform can beat it
    job.progress.begin(f"search {level:.0%}", trials)

    @cache  # measured before the first trial, and not at all where all trials are done
    def reference() -> list[Tensor]:
        return _uniform_parts(job, notes, job.table(uniform, level, target.context_length))

    def shares_of(candidate: BudgetAllocator) -> Tensor:
        return plugin_call.shares(candidate, job.importance, budget) if learned is None else learned

    def evaluate(candidate: BudgetAllocator) -> Iterable[Tensor]:
        return target.token_losses(job.table(shares_of(candidate), level, target.context_length))

    try:
        best = run_trials(
            study,
            method.allocator,
            evaluate,
            reference,
            against="uniform",
            trials=trials,
            seed=job.settings.seed,
            sampler=job.settings.sampler,
            progress=job.progress,
        )
    finally:
        job.progress.end()
    if learned is not None:  # and kept only now: until a trial has ended, other settings may take the study over
        notes.keep_fitted_shares(learned)
    uniform_loss = notes.uniform_loss
    if uniform_loss is None:  # the trials are from a version that did not keep it
        uniform_loss = _mean_loss(reference())
    if best is None or best.excess >= 0:
        return SearchResult(uniform, None, uniform_loss, uniform_loss)
    params = best.params
    if learned is not None and method.learner is not None:
        params = plugin_call.params_of(method.learner)
    shares = shares_of(method.allocator_with(params))
    return SearchResult(shares, params, uniform_loss + best.excess, uniform_loss)


def _uniform_parts(job: Job, notes: StudyNotes, table: Tensor) -> list[Tensor]:
    """`chunk_parts` of the uniform table on the search's sequences. Their mean loss is noted."""
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
