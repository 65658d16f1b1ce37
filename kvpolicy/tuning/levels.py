"""Level after level: down to a limit on the loss, and each with its passkey score."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import optuna

from kvpolicy.budget.plan import PlanLevel
from kvpolicy.errors import BudgetError
from kvpolicy.tuning.level import Job, search_level
from kvpolicy.tuning.passkey import ABLE, PasskeyCheck

Levels = tuple[PlanLevel, ...]


def search_levels(job: Job, studies: dict[float, optuna.Study]) -> tuple[Levels, PlanLevel | None]:
    """The levels, largest retention first, and under `max_loss` the first one that fails it, where the search ends.

    Raises `BudgetError` where the first level fails.
    """
    levels: list[PlanLevel] = []
    limit, missed = job.settings.max_loss, None
    for retention, study in studies.items():
        level = search_level(job, study, retention)
        if limit is not None and _bound(level) > limit:
            missed = level
            break
        levels.append(level)
    if missed is not None and not levels:
        raise BudgetError(
            f"no retention keeps within max_loss={limit:g}: with {_kept(missed)}. Give a larger retention or max_loss="
            + ("" if job.settings.storage is None else "; the study is kept, and resume=True goes on with it")
        )
    if limit is not None:
        job.progress.note(limit_said(limit_figures(limit, tuple(levels), missed)))
    return tuple(levels), missed


def limit_figures(limit: float, levels: Levels, missed: PlanLevel | None) -> dict[str, Any]:
    """What came of `max_loss`, for the plan's provenance."""
    smallest = levels[-1]
    failed = None if missed is None else {"retention": missed.retention, "bound": _bound(missed)}
    return {"limit": limit, "smallest": smallest.retention, "bound": _bound(smallest), "failed": failed}


def limit_said(figures: dict[str, Any]) -> str:
    """The same in words."""
    failed = figures["failed"]
    after = (
        "no smaller one was tried"
        if failed is None
        else (f"{failed['retention']:.4g} fails, {failed['bound']:+.2%} at most")
    )
    return (
        f"the smallest cache whose held-out loss is at most {100 * figures['limit']:.4g} % above the full cache's: "
        f"retention {figures['smallest']:.4g}, {figures['bound']:+.2%} at most (95 %); {after}"
    )


def check_passkeys(job: Job, check: PasskeyCheck | str, levels: Levels) -> tuple[Levels, dict[str, Any]]:
    """The levels with their passkey scores, where the model can do the task with the full cache, and what is known of
    that.

    check: or why there is none
    """
    if isinstance(check, str):
        job.progress.note(f"no passkey check: {check}")
        return levels, {"skipped": check}
    tables = [job.table(level.shares, level.retention, check.length) for level in levels]
    job.progress.begin("pass keys", 1)
    try:
        full, scores = check.scores(tables)
        job.progress.advance()
    finally:
        job.progress.end()
    facts = {"full": full, "n": check.count, "length": check.length}
    told = f"held-out pass keys found: {full:.0%} of {check.count} with the full cache"
    if not scores:
        job.progress.note(f"{told}, fewer than {ABLE:.0%}: this model cannot do the task, so levels have no score")
        return levels, facts
    each = (f"{score:.0%} at {level.retention:.0%} kept" for score, level in zip(scores, levels, strict=True))
    job.progress.note(f"{told}, {', '.join(each)}")
    scored = (
        replace(level, retrieval=level.retrieval | {"passkey": {"score": score, **facts}})
        for level, score in zip(levels, scores, strict=True)
    )
    return tuple(scored), facts


def _bound(level: PlanLevel) -> float:
    """Upper end of the 95 % interval of the relative increase of the held-out loss."""
    return float(level.comparison["loss_over_full"]["interval"][1])


def _kept(level: PlanLevel) -> str:
    found = level.comparison["loss_over_full"]
    return (
        f"{level.retention:.4g} kept the held-out loss is {found['increase']:+.2%} above the full cache's, at most "
        f"{_bound(level):+.2%} (95 %, n = {found['n']})"
    )
