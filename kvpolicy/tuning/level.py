"""One retention: search the allocator's parameters, check what was found on the held-out text."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import optuna
import torch
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import WilcoxonPruner
from torch import Tensor

from kvpolicy.apportion import apportion
from kvpolicy.errors import KVPolicyError, ModelError, PluginError
from kvpolicy.evaluate import perplexity
from kvpolicy.integrations.transformers import TransformersProbe
from kvpolicy.interfaces import BudgetAllocator
from kvpolicy.plan import PlanLevel, kept_fractions
from kvpolicy.progress import Progress
from kvpolicy.registry import registry
from kvpolicy.spec import Budget, Importance, ModelSpec
from kvpolicy.stats import PairedDifference, paired_difference
from kvpolicy.tuning.search import CHUNKS, chunk_means, run_trials, stopped_trials
from kvpolicy.tuning.settings import TuneSettings

_FITTED = "kvpolicy_fitted"


@dataclass(frozen=True, slots=True)
class Job:
    """Everything a level needs."""

    settings: TuneSettings
    spec: ModelSpec
    allocator: type[BudgetAllocator]
    importance: Importance
    search: TransformersProbe
    heldout: TransformersProbe
    heldout_full: Tensor
    trials: int
    progress: Progress

    def budget(self, retention: float) -> Budget:
        context = self.search.context_length
        floor = min(self.search.num_sink_tokens + 1, context)
        total = max(self.spec.total_entries(retention, context), floor * self.importance.per_head.numel())
        return Budget(total=total, shape=self.spec.table_shape, floor=floor, ceiling=context)


def search_level(job: Job, study: optuna.Study, retention: float) -> PlanLevel:
    """Searches one level and checks what was found on the held-out text."""
    budget, uniform_shares = job.budget(retention), torch.ones(job.spec.table_shape)
    uniform = _table(uniform_shares, budget)
    learned = fitted_shares(job, study, retention, budget)
    trials = job.trials if learned is None else 1
    job.progress.begin(f"search {retention:.0%}", trials)
    reference = torch.cat(list(chunk_means(job.search.token_losses(uniform))))
    if not bool(torch.isfinite(reference).all()):
        raise ModelError(
            f"the model's loss on the search text is not finite in {job.search.model.dtype}: try another --dtype"
        )
    study.pruner = _pruner()

    def shares_of(candidate: BudgetAllocator) -> Tensor:
        with blamed("allocator", job.settings.allocator):
            return candidate.shares(job.importance, budget) if learned is None else learned

    def evaluate(candidate: BudgetAllocator) -> Iterable[Tensor]:
        return job.search.token_losses(_table(shares_of(candidate), budget))

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
        study.set_user_attr(_FITTED, learned.tolist())
    if found is None or found.excess >= 0:
        return _checked(job, retention, uniform_shares, None, float(reference.mean()), uniform, searched=study)
    params = found.params if learned is None else fitting(job.settings).params()
    chosen = registry.create("allocator", job.settings.allocator, params)
    search_loss = float(reference.mean()) + found.excess
    return _checked(job, retention, shares_of(chosen), params, search_loss, uniform, searched=study)


def fitted_shares(job: Job, study: optuna.Study, retention: float, budget: Budget) -> Tensor | None:
    """What the allocator learns for this level, or learned before in a study that is resumed; None if it does not.

    It is kept once its trial has run: from then on the study is not taken over by other settings.
    """
    kept = study.user_attrs.get(_FITTED)
    if kept is not None:
        job.progress.note(f"{retention:.0%} kept: learned before, in this study")
        return torch.tensor(kept, dtype=torch.float64)
    with blamed("allocator", job.settings.allocator):
        learned = fitting(job.settings).fit(job.search, job.importance, budget)
    return None if learned is None else learned.detach().to("cpu", torch.float64)


def learns(allocator: type[BudgetAllocator]) -> bool:
    """Whether it learns shares from the model instead of being searched."""
    return allocator.fit is not BudgetAllocator.fit


def fitting(settings: TuneSettings) -> BudgetAllocator:
    """The allocator as it learns."""
    made: BudgetAllocator = registry.create("allocator", settings.allocator, settings.allocator_params)
    return made


def _checked(
    job: Job,
    retention: float,
    shares: Tensor,
    params: dict[str, Any] | None,
    search_loss: float,
    uniform: Tensor,
    searched: optuna.Study,
) -> PlanLevel:
    """The level with its held-out figures. `params` None means that uniform was kept."""
    progress, beats = job.progress, params is not None
    progress.begin(f"held-out text {retention:.0%}", 2)
    at_uniform = job.heldout.loss(uniform)
    progress.advance()
    loss = job.heldout.loss(_table(shares, job.budget(retention))) if beats else at_uniform
    progress.advance()
    progress.end()
    difference = paired_difference(loss, at_uniform, job.settings.seed)
    progress.note(_summary(retention, beats, loss, at_uniform, job.heldout_full, difference))
    return PlanLevel(
        retention=retention,
        shares=kept_fractions(shares, retention),
        allocator_params=params or {},
        perplexity={
            "search": perplexity(torch.tensor([search_loss])),
            "heldout": perplexity(loss),
            "heldout_full": perplexity(job.heldout_full),
            "heldout_uniform": perplexity(at_uniform),
        },
        comparison={
            "loss_minus_uniform": difference.mean,
            "interval": [difference.low, difference.high],
            "n": difference.n,
            "verdict": f"{difference.verdict} uniform" if beats else "uniform kept: no trial beat it",
            "trials_stopped_early": stopped_trials(searched),
        },
    )


def _table(shares: Tensor, budget: Budget) -> Tensor:
    """Capacities `[L, H]`, through the same two steps as `BudgetPlan.capacities`."""
    retention = budget.total / (budget.shape[0] * budget.shape[1] * int(budget.ceilings().max()))
    return apportion(kept_fractions(shares, retention), budget)


def _summary(
    retention: float, beats: bool, loss: Tensor, uniform: Tensor, full: Tensor, difference: PairedDifference
) -> str:
    figures = (
        f"{retention:.0%} kept: held-out perplexity {perplexity(loss):.3f} (uniform {perplexity(uniform):.3f}, full "
        f"{perplexity(full):.3f})"
    )
    if not beats:
        return f"{figures}; no trial beat uniform on the search text, so the plan stores uniform"
    interval = f"loss {difference.mean:+.4f}, 95 % [{difference.low:+.4f}, {difference.high:+.4f}], n = {difference.n}"
    return f"{figures}; {difference.verdict} uniform ({interval})"


def _pruner() -> WilcoxonPruner:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        # two sequences at least: on one alone, chunks that are worse together say little about the others
        return WilcoxonPruner(p_threshold=0.1, n_startup_steps=2 * CHUNKS)


@contextmanager
def blamed(role: str, name: str) -> Iterator[None]:
    """Says whose fault an exception of a plugin is."""
    try:
        yield
    except KVPolicyError:
        raise
    except Exception as error:
        raise PluginError(f"{role} '{name}' failed: {type(error).__name__}: {error}") from error
