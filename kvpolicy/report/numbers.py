"""The numbers and words that every kind of report shows."""

from __future__ import annotations

import math

from torch import Tensor

from kvpolicy.budget.entry_format import named
from kvpolicy.budget.plan import BudgetPlan, PlanChoice, PlanLevel

LOST_FACTS = 0.05
"""A passkey score that is lower than the full cache's by more than this is worth a warning."""
ITEMSIZE = 2  # bytes of one number in float16 and bfloat16, which the byte columns assume


def relative_budgets(level: PlanLevel) -> Tensor:
    """Each KV head's budget as a multiple of the uniform one, float64 `[L, H]`; the mean is 1."""
    return level.shares / level.retention


def sorted_levels(plan: BudgetPlan) -> list[PlanLevel]:
    """The levels, smallest retention first."""
    return sorted(plan.levels, key=lambda level: level.retention)


def bytes_per_token(plan: BudgetPlan, retention: float) -> float:
    """Bytes of keys and values that the budgeted layers keep per token of context, in 16-bit numbers."""
    layers, heads = plan.model.table_shape
    return retention * layers * heads * 2 * plan.model.head_dim * ITEMSIZE


def level_bytes(plan: BudgetPlan, level: PlanLevel) -> float:
    """Bytes of keys and values that a level keeps per token of context, in its formats."""
    if level.formats is None:
        return bytes_per_token(plan, level.retention)
    dim, total = plan.model.head_dim, 0.0
    for shares, own in zip(level.shares, map(named, level.formats), strict=True):
        total += float(shares.sum()) * 2 * (dim * ITEMSIZE if own is None else own.row_bytes(dim))
    return total


def size(count: float) -> str:
    """A number of bytes with a unit that people use, such as `1.54 kB`: a kB is 1000 bytes, as on a GPU's box."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.995:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def percent(retention: float) -> str:
    """A retention as it stands in headings: `30 %`, `12.5 %`."""
    return f"{100 * retention:.4g} %"


def choice(plugin: PlanChoice | None) -> str:
    """A plugin by name with its parameters: `streaming (num_sink_tokens=4)`."""
    if plugin is None:
        return "none"
    params = ", ".join(f"{name}={value}" for name, value in plugin.params.items())
    return f"{plugin.name} ({params})" if params else plugin.name


def method(plan: BudgetPlan) -> str:
    """Estimator, allocator and policy in one line, those that there are."""
    chosen = (plan.method.estimator, plan.method.allocator, plan.method.policy)
    return " / ".join(x.name for x in chosen if x is not None)


def model_name(plan: BudgetPlan) -> str:
    """The model's name on one line, with its revision."""
    name = " ".join(plan.model.id.split()) or "unnamed model"
    return f"{name} @ {plan.model.revision}" if plan.model.revision else name


def excess(level: PlanLevel) -> str:
    """Perplexity above the full cache's, as a share of what uniform budgets add; '' if not measured."""
    values = [level.perplexity.get(name) for name in ("heldout", "heldout_full", "heldout_uniform")]
    ours, full, uniform = (math.nan if value is None else value for value in values)
    return f"{100 * (ours - full) / (uniform - full):.0f} %" if uniform > full and not math.isnan(ours) else ""


def verdict(level: PlanLevel) -> str:
    """The comparison with uniform in words; '' if there was none."""
    return str(level.comparison.get("verdict", ""))


def interval(level: PlanLevel) -> str:
    """95 % interval of the held-out loss minus uniform's, nats per token; '' if there was none."""
    bounds = level.comparison.get("interval")
    if isinstance(bounds, list) and len(bounds) == 2 and all(isinstance(x, int | float) for x in bounds):
        return f"{bounds[0]:+.4f} to {bounds[1]:+.4f}"
    return ""


def passkeys(level: PlanLevel) -> str:
    """Part of held-out pass keys that is found, and with the full cache: `85 of 95 %`; '' if not measured."""
    passkey = level.retrieval.get("passkey") or {}
    if passkey.get("score") is None or passkey.get("full") is None:
        return ""
    return f"{100 * passkey['score']:.0f} of {100 * passkey['full']:.0f} %"


def vetoed(level: PlanLevel) -> str:
    """A warning, where the held-out text found what the search chose worse than uniform; else ''."""
    veto = level.comparison.get("veto")
    if not veto:
        return ""
    worse = veto.get("loss_minus_uniform") if isinstance(veto, dict) else None
    figure = f" by {worse:.4f} nats a token" if isinstance(worse, int | float) else ""
    return (
        f"at {percent(level.retention)} kept the budgets found are worse than uniform on held-out text{figure}: the "
        "plan stores uniform. More trials, sequences or text may find better ones"
    )


def lost_facts(plan: BudgetPlan, level: PlanLevel) -> str:
    """A warning, where more than 5 points fewer pass keys are found than with the full cache; else ''."""
    passkey = level.retrieval.get("passkey") or {}
    score, full = passkey.get("score"), passkey.get("full")
    if score is None or full is None or full - score <= LOST_FACTS + 1e-9:
        return ""
    by_text_alone = plan.provenance.get("objective", "perplexity") == "perplexity"
    return (
        f"at {percent(level.retention)} kept the model finds {100 * score:.0f} % of held-out pass keys, and "
        f"{100 * full:.0f} % with the full cache: perplexity alone hides lost facts. Keep more"
        f"{', or tune with objective=mixed' if by_text_alone else ''}"
    )
