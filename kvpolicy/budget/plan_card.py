"""The page that goes with a plan which is shared: what it is, what it measured, how to run it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from kvpolicy.budget.entry_format import name_of
from kvpolicy.files.plain import markdown_text

if TYPE_CHECKING:
    from kvpolicy.budget.plan import BudgetPlan
    from kvpolicy.budget.plan_parts import PlanLevel

_COLUMNS = ("kept", "perplexity", "uniform budgets", "full cache", "against uniform, held-out text", "pass keys found")
_PROVENANCE = ("objective", "protocol", "text", "context_length", "trials", "seed", "dtype", "created", "kvpolicy")


def plan_card(plan: BudgetPlan, name: str) -> str:
    """A README with the Hub's head. All figures are the plan's own; what was not measured stays empty.

    name: where the plan will lie
    """
    model, policy = plan.model, plan.method.policy.name
    head = ["library_name: kvpolicy", "tags: [kvpolicy, kv-cache]"]
    if "/" in model.id:
        head.append(f"base_model: {json.dumps(model.id)}")
    levels = sorted(plan.levels, key=lambda level: level.retention)
    return "\n".join(
        [
            "---",
            *head,
            "---",
            "",
            f"# KV-cache budgets for {markdown_text(model.id) or 'a model'}",
            "",
            f"A plan of kvpolicy: how many entries each of the {model.num_kv_heads} KV heads of "
            f"{len(model.budgeted_layers)} layers keeps. It was made for the policy `{markdown_text(policy)}`.",
            "",
            "```console",
            f"$ kvpolicy pull {name} --out plan.json",
            f"$ kvpolicy generate plan.json --retention {levels[-1].retention:g} --prompt-file notes.txt",
            "```",
            "",
            _row(_COLUMNS),
            "|" + "---|" * len(_COLUMNS),
            *(_row(_cells(level)) for level in levels),
            "",
            *(f"- entries at {100 * x.retention:.4g} %: {name_of(x.entry_format)}" for x in levels if x.formats),
            "Perplexity and pass keys are of text that the search never saw. What stands here is what the plan says.",
            "",
            *(f"- {key}: {markdown_text(str(plan.provenance[key]))}" for key in _PROVENANCE if key in plan.provenance),
            f"- sha256 of the plan: {plan.sha256}",
            "",
        ]
    )


def _cells(level: PlanLevel) -> list[str]:
    keys = ("heldout", "heldout_uniform", "heldout_full")
    figures = ["" if (value := level.perplexity.get(key)) is None else f"{value:.3f}" for key in keys]
    passkey = level.retrieval.get("passkey") or {}
    score, full = passkey.get("score"), passkey.get("full")
    found = "" if score is None or full is None else f"{100 * score:.0f} of {100 * full:.0f} %"
    return [f"{100 * level.retention:.4g} %", *figures, str(level.comparison.get("verdict", "")), found]


def _row(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(map(markdown_text, cells))} |"
