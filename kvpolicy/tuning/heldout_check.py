"""What a level's search settled on, beside uniform and the full cache on text that the search never saw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import optuna
import torch

from kvpolicy.budget.entry_format import name_of, of_layer
from kvpolicy.budget.plan import PlanLevel
from kvpolicy.measure.evaluation import perplexity
from kvpolicy.measure.stats import PairedDifference, paired_difference, relative_increase
from kvpolicy.tuning.job import Job
from kvpolicy.tuning.probes import Losses
from kvpolicy.tuning.search import stopped_trials
from kvpolicy.tuning.search_level import SearchResult
from kvpolicy.tuning.settings import TuneSettings
from kvpolicy.tuning.study_notes import StudyNotes


@dataclass(frozen=True, slots=True, eq=False)
class _Heldout:
    """Held-out losses: under the plan, under uniform capacities, and under the full cache."""

    plan: Losses
    uniform: Losses
    full: Losses

    def difference(self, seed: int) -> PairedDifference:
        return paired_difference(self.plan.target, self.uniform.target, seed)


def checked_level(job: Job, study: optuna.Study, level: float, result: SearchResult) -> PlanLevel:
    """The level with its held-out figures; uniform capacities where the held-out text finds the result worse."""
    notes, seed = StudyNotes(study), job.settings.seed
    heldout = _heldout(job, notes, level, result)
    difference = heldout.difference(seed)
    job.progress.note(_summary(job.settings, level, result, heldout, difference))
    verdict, veto = f"{difference.verdict} uniform", {}
    if not result.beats_uniform:
        verdict = "uniform kept: no trial beat it"
    elif difference.mean > 0:
        # A veto, and no choice: the next best trial is not looked at, so the held-out text has no say in which trial
        # is taken, and its figures stay those of text that nothing was searched on.
        verdict, veto = "uniform kept: the held-out text vetoed the search", {"veto": _figures(difference)}
        result, heldout = result.as_uniform(), _Heldout(heldout.uniform, heldout.uniform, heldout.full)
        difference = heldout.difference(seed)
    search = _search_losses(job, notes, level, result)
    shares = job.kept(result.shares, level)
    return PlanLevel(
        retention=float(shares.mean()) if job.sizes.by_bytes else level,
        shares=shares,
        allocator_params=result.params or {},
        perplexity={
            "search": perplexity(search.text),
            "heldout": perplexity(heldout.plan.text),
            "heldout_full": perplexity(heldout.full.text),
            "heldout_uniform": perplexity(heldout.uniform.text),
        },
        comparison={
            **_figures(difference),
            "verdict": verdict,
            **veto,
            "trials_stopped_early": stopped_trials(study),
            "loss_over_full": _over_full(job.settings, heldout),
        },
        retrieval=_answer_losses(search, heldout),
        formats=_formats(job),
    )


def _heldout(job: Job, notes: StudyNotes, level: float, result: SearchResult) -> _Heldout:
    job.progress.begin(f"held-out text {level:.0%}", 2)
    uniform = job.losses(notes, "heldout", torch.ones(job.spec.table_shape), level)
    job.progress.advance()
    plan = job.losses(notes, "heldout", result.shares, level) if result.beats_uniform else uniform
    job.progress.advance()
    job.progress.end()
    return _Heldout(plan, uniform, job.heldout_full)


def _search_losses(job: Job, notes: StudyNotes, level: float, result: SearchResult) -> Losses:
    """Text and answers apart; the objective "perplexity" has measured the one that there is."""
    if job.settings.objective == "perplexity":
        loss = torch.tensor([result.loss], dtype=torch.float64)
        return Losses(loss, None, loss)
    return job.losses(notes, "search", result.shares, level)


def _formats(job: Job) -> tuple[str, ...] | None:
    own = job.search.text.entry_format
    names = [name_of(of_layer(own, layer)) for layer in range(job.spec.num_budgeted_layers)]
    return None if own is None else tuple(names)


def _figures(difference: PairedDifference) -> dict[str, Any]:
    return {
        "loss_minus_uniform": difference.mean,
        "interval": [difference.low, difference.high],
        "n": difference.n,
    }


def _answer_losses(search: Losses, heldout: _Heldout) -> dict[str, Any]:
    """Mean losses of the answers' tokens; nothing where there were no needle prompts."""
    losses = {
        "search": search,
        "heldout": heldout.plan,
        "heldout_full": heldout.full,
        "heldout_uniform": heldout.uniform,
    }
    means = {name: float(part.answers.mean()) for name, part in losses.items() if part.answers is not None}
    return {"answer_loss": means} if means else {}


def _over_full(settings: TuneSettings, heldout: _Heldout) -> dict[str, Any]:
    """The relative increase of the held-out loss that a limit is about: the answers' where the objective goes by them
    alone, else the text's.
    """
    ours, base = heldout.plan.text, heldout.full.text
    if settings.goes_by_answers and heldout.plan.answers is not None and heldout.full.answers is not None:
        ours, base = heldout.plan.answers, heldout.full.answers
    increase, low, high = relative_increase(ours, base, settings.seed)
    return {"increase": increase, "interval": [low, high], "n": len(base)}


def _summary(
    settings: TuneSettings, level: float, result: SearchResult, heldout: _Heldout, difference: PairedDifference
) -> str:
    plan, uniform, full = heldout.plan, heldout.uniform, heldout.full
    figures = (
        f"{settings.named(level)}: held-out perplexity {perplexity(plan.text):.3f} (uniform "
        f"{perplexity(uniform.text):.3f}, full {perplexity(full.text):.3f})"
    )
    if plan.answers is not None and uniform.answers is not None and full.answers is not None:
        figures += (
            f", answer loss {float(plan.answers.mean()):.4f} (uniform {float(uniform.answers.mean()):.4f}, full "
            f"{float(full.answers.mean()):.4f})"
        )
    objective = settings.objective
    if not result.beats_uniform:
        where = "on the search text" if objective == "perplexity" else "in the search"
        return f"{figures}; no trial beat uniform {where}, so the plan stores uniform"
    interval = f"loss {difference.mean:+.4f}, 95 % [{difference.low:+.4f}, {difference.high:+.4f}], n = {difference.n}"
    scored = "" if objective == "perplexity" else f" on {objective}"
    vetoed = ", so the plan stores uniform" if difference.mean > 0 else ""
    return f"{figures}; {difference.verdict} uniform{scored} ({interval}){vetoed}"
