"""What a method was calibrated on, as its plan records it."""

from __future__ import annotations

from typing import Any

from kvpolicy.budget.plan import BudgetPlan
from kvpolicy.files.fields import Fields, number, sequence, whole

_SAME_RETENTION = 1e-9
_SEARCH = ("trials", "search_sequences", "context_length", "text_sha256")


def calibration_of(plan: BudgetPlan | None, retention: float) -> dict[str, Any]:
    """Tokens, forwards and seconds that were run on calibration text before a plan could be used at this retention, as
    JSON values, with what else the plan says about its search.

    They are those of profiling, and of the level that is used, or of the two levels between which shares are
    interpolated. All 0 without a plan and for a table of a user's own; missing where the plan does not record them.

    Raises `PlanError` for a record that cannot be read.
    """
    if plan is None or plan.method.allocator is None:
        return {"tokens": 0, "forwards": 0, "seconds": 0.0}
    known = {name: plan.provenance[name] for name in _SEARCH if name in plan.provenance}
    recorded = Fields(plan.provenance, "provenance")
    if not recorded.has("calibration"):
        return known
    used, tokens, forwards, seconds = _levels_used(plan, retention), 0, 0, 0.0
    for index, value in enumerate(recorded.read("calibration", sequence)):
        record = Fields(value, f"provenance.calibration[{index}]")
        level = record.read("retention", number) if record.has("retention") else None
        if level is None or any(abs(level - other) < _SAME_RETENTION for other in used):
            tokens += int(record.read("tokens", number))  # may be more than `whole` takes
            forwards += record.read("forwards", whole, 0)
            seconds += record.read("seconds", number)
    return known | {"tokens": tokens, "forwards": forwards, "seconds": seconds}


def _levels_used(plan: BudgetPlan, retention: float) -> list[float]:
    """The stored levels that shares at this retention are made of."""
    below = [level for level in plan.retentions if level <= retention + _SAME_RETENTION]
    above = [level for level in plan.retentions if level > retention + _SAME_RETENTION]
    if not below:
        return []  # the plan does not reach so low
    return below[-1:] if retention - below[-1] < _SAME_RETENTION else [below[-1], *above[:1]]
