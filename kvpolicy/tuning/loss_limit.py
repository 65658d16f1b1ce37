"""The limit on the loss, `max_loss`: which level fails it, and what is said of it."""

from __future__ import annotations

from typing import Any

from kvpolicy.budget.plan import PlanLevel
from kvpolicy.errors import BudgetError
from kvpolicy.tuning.settings import TuneSettings


def fails(level: PlanLevel, limit: float) -> bool:
    """Whether the held-out loss may be above the limit."""
    return _bound(level) > limit


def no_level_error(settings: TuneSettings, failed: PlanLevel) -> BudgetError:
    """Where already the first level has failed."""
    over = failed.comparison["loss_over_full"]
    return BudgetError(
        f"no retention keeps within max_loss={settings.max_loss:g}: with {failed.retention:.4g} kept the held-out loss "
        f"is {over['increase']:+.2%} above the full cache's, at most {_bound(failed):+.2%} (95 %, n = {over['n']}). "
        "Give a larger retention or max_loss="
        + ("" if settings.storage is None else "; the study is kept, and resume=True goes on with it")
    )


def limit_figures(limit: float, levels: tuple[PlanLevel, ...], failed: PlanLevel | None) -> dict[str, Any]:
    """What came of the limit, for the plan's provenance."""
    smallest = levels[-1]
    failure = None if failed is None else {"retention": failed.retention, "bound": _bound(failed)}
    return {"limit": limit, "smallest": smallest.retention, "bound": _bound(smallest), "failed": failure}


def limit_sentence(figures: dict[str, Any]) -> str:
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


def _bound(level: PlanLevel) -> float:
    """Upper end of the 95 % interval of the relative increase of the held-out loss."""
    return float(level.comparison["loss_over_full"]["interval"][1])
