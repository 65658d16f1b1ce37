"""A plan as rich tables."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from kvpolicy.budget.entry_format import name_of
from kvpolicy.budget.plan import BudgetPlan
from kvpolicy.report.grid import Grid
from kvpolicy.report.numbers import (
    bytes_per_token,
    choice,
    excess,
    interval,
    level_bytes,
    lost_facts,
    model_name,
    passkeys,
    percent,
    size,
    sorted_levels,
    verdict,
    vetoed,
)

LEVEL_COLUMNS = (
    ("kept", "kept"),
    ("format", "format"),
    ("KV per token", "per token"),
    ("perplexity", "heldout"),
    ("uniform", "heldout_uniform"),
    ("full", "heldout_full"),
    ("search text", "search"),
    ("added / uniform's", "excess"),
    ("against uniform", "verdict"),
    ("loss, 95 %", "interval"),
    ("answer loss", "answers"),
    ("uniform's", "answers_uniform"),
    ("full's", "answers_full"),
    ("pass keys found", "passkeys"),
)
"""Heading and key of each column that a table of levels can have."""
_WIDE = {"per token", "search", "excess"}  # the others fit 80 characters
_FACTS = {"kept", "answers", "answers_uniform", "answers_full", "passkeys"}


def level_rows(plan: BudgetPlan) -> list[dict[str, str]]:
    """One row per level with the texts of `LEVEL_COLUMNS`, smallest retention first; unmeasured cells are ''."""
    rows = []
    for level in sorted_levels(plan):
        row = {name: f"{value:.3f}" for name, value in level.perplexity.items()}
        row["kept"] = percent(level.retention)
        row["per token"] = size(level_bytes(plan, level))
        row["format"] = "" if level.formats is None else name_of(level.entry_format)
        for key, name in (
            ("answers", "heldout"),
            ("answers_uniform", "heldout_uniform"),
            ("answers_full", "heldout_full"),
        ):
            value = (level.retrieval.get("answer_loss") or {}).get(name)
            row[key] = "" if value is None else f"{value:.4f}"
        row["passkeys"] = passkeys(level)
        row["excess"], row["verdict"], row["interval"] = excess(level), verdict(level), interval(level)
        rows.append(row)
    return rows


def summary_rows(plan: BudgetPlan) -> list[tuple[str, str]]:
    """Name and text of what identifies a plan."""
    model, (layers, heads) = plan.model, plan.model.table_shape
    return [
        ("model", model_name(plan)),
        ("budgeted", f"{layers} of {model.num_layers} layers x {heads} KV heads ({model.num_q_heads} query heads)"),
        ("KV, nothing evicted", f"{size(bytes_per_token(plan, 1.0))} per token in 16-bit numbers"),
        ("estimator", choice(plan.method.estimator)),
        ("allocator", choice(plan.method.allocator)),
        ("policy", choice(plan.method.policy)),
        *([("objective", str(plan.provenance["objective"]))] if "objective" in plan.provenance else []),
    ]


def summary_table(plan: BudgetPlan) -> Table:
    """What the plan was made for and by."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in summary_rows(plan):
        table.add_row(name, Text(value))
    return table


def levels_table(plan: BudgetPlan) -> Grid:
    """One row per retention: perplexities and the comparison with uniform, as far as they were measured."""
    return _grid_of(level_rows(plan), "levels", {key for _, key in LEVEL_COLUMNS} - (_FACTS - {"kept"}))


def facts_table(plan: BudgetPlan) -> Grid | None:
    """One row per retention: how well answers are found in long prompts; None where that was not measured."""
    rows = level_rows(plan)
    measured = any(row.get(key) for row in rows for key in _FACTS - {"kept"})
    return _grid_of(rows, "answers in long prompts", _FACTS) if measured else None


def _grid_of(rows: list[dict[str, str]], title: str, keys: set[str]) -> Grid:
    columns = [(head, key) for head, key in LEVEL_COLUMNS if key in keys and any(row.get(key) for row in rows)]
    return Grid(
        [head for head, _ in columns],
        [[row.get(key, "") for _, key in columns] for row in rows],
        title=title,
        words=[head for head, key in columns if key in ("format", "verdict")],
        optional=[head for head, key in columns if key in _WIDE],
    )


def warnings_of(plan: BudgetPlan) -> list[str]:
    """What a reader of the levels should know, a line each, smallest retention first."""
    levels = sorted_levels(plan)
    warnings = [*map(vetoed, levels), *(lost_facts(plan, level) for level in levels)]
    return [f"warning: {warning}" for warning in warnings if warning]
