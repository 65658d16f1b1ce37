"""Level after level, largest retention first, down to a limit on the loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import optuna

from kvpolicy.budget.plan import PlanLevel
from kvpolicy.tuning.costs import metered
from kvpolicy.tuning.heldout_check import checked_level
from kvpolicy.tuning.job import Job
from kvpolicy.tuning.loss_limit import fails, limit_figures, limit_sentence, no_level_error
from kvpolicy.tuning.search_level import search_level
from kvpolicy.tuning.study_notes import StudyNotes


def search_levels(
    job: Job, studies: dict[float, optuna.Study], job_of: Callable[[float], Job] | None = None
) -> tuple[tuple[PlanLevel, ...], PlanLevel | None]:
    """The levels, and under `max_loss` the first one that fails it, where the search ends.

    job_of: what to do at a level, where levels differ in it

    Raises `BudgetError` where the first level fails.
    """
    levels: list[PlanLevel] = []
    limit, failed = job.settings.max_loss, None
    for asked, study in studies.items():
        own = job
        if job_of is not None:
            with metered(job.search.text.model, partial(StudyNotes(study).keep_cost, "search")):
                own = job_of(asked)
        level = checked_level(own, study, asked, search_level(own, study, asked))
        if limit is not None and fails(level, limit):
            failed = level
            break
        levels.append(level)
    if failed is not None and not levels:
        raise no_level_error(job.settings, failed)
    if limit is not None:
        job.progress.note(limit_sentence(limit_figures(limit, tuple(levels), failed)))
    return tuple(levels), failed
