"""A plan as one HTML file that needs nothing beside it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from kvpolicy.budget.plan import BudgetPlan
from kvpolicy.report.chart import Point, Series, chart
from kvpolicy.report.heat_cells import heat_cells
from kvpolicy.report.kept_tokens import KeptTokens, kept_tokens_html
from kvpolicy.report.numbers import (
    level_bytes,
    model_name,
    percent,
    relative_budgets,
    size,
    sorted_levels,
)
from kvpolicy.report.page import facts, grid, page, text, warning
from kvpolicy.report.shades import budget_shade, importance_shade, relative_importance
from kvpolicy.report.tables import LEVEL_COLUMNS, level_rows, summary_rows, warnings_of


def plan_html(plan: BudgetPlan, sample: KeptTokens | None = None) -> str:
    """The whole document: levels, quality over bytes, the search, heat maps, provenance. sample: of one prompt"""
    return page(
        f"KV budgets: {model_name(plan)}",
        [
            facts(summary_rows(plan)),
            "<h2>Levels</h2>",
            _levels(plan),
            *map(warning, warnings_of(plan)),
            f'<div class="beside">{_quality(plan)}{_history(plan)}</div>',
            "<h2>Budgets</h2>",
            _maps(plan),
            *([] if sample is None else ["<h2>What is kept of a prompt</h2>", kept_tokens_html(sample)]),
            "<h2>Numbers</h2>",
            *_budgets(plan),
            "<h2>Provenance</h2>",
            facts((str(name), _shown(value)) for name, value in plan.provenance.items() if name != "history"),
        ],
    )


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _levels(plan: BudgetPlan) -> str:
    rows = level_rows(plan)
    columns = [(head, key) for head, key in LEVEL_COLUMNS if any(row.get(key) for row in rows)]
    words = [head for head, key in columns if key == "verdict"]
    return grid([head for head, _ in columns], [[row.get(key, "") for _, key in columns] for row in rows], words)


def _quality(plan: BudgetPlan) -> str:
    """Held-out perplexity over the bytes of a token; nothing where no level was measured."""
    levels = sorted_levels(plan)
    full = next((x for level in levels if (x := level.perplexity.get("heldout_full")) is not None), None)
    series = []
    for name, key in (("this plan", "heldout"), ("uniform budgets", "heldout_uniform")):
        points = [
            Point(weight / 1000, value, f"{percent(level.retention)} kept, {size(weight)} a token, {value:.3f}")
            for level in levels
            if (value := level.perplexity.get(key)) is not None and (weight := level_bytes(plan, level))
        ]
        if points:
            series.append(Series(name, tuple(points)))
    if not series:
        return ""
    mark = None if full is None else (f"full cache, {full:.3f}", full)
    return chart("Quality over bytes", series, "KV per token, kB", "perplexity on held-out text", mark)


def _history(plan: BudgetPlan) -> str:
    """The trials of each level in the order they ran; nothing where the plan does not have them."""
    recorded = plan.provenance.get("history")
    series = []
    for level in recorded if isinstance(recorded, list) else []:
        if not isinstance(level, dict) or not isinstance(level.get("retention"), int | float):
            continue
        losses = level.get("loss_minus_uniform")
        points = [
            Point(number, loss, f"trial {number}, {loss:+.4f}")
            for number, loss in enumerate(losses if isinstance(losses, list) else [], 1)
            if isinstance(loss, int | float)
        ]
        if points:
            series.append(Series(f"{percent(level['retention'])} kept", tuple(points), has_line=False))
    if not series:
        return ""
    return chart("The search", series, "trial", "loss minus uniform's, nats a token", ("as uniform budgets", 0.0))


def _maps(plan: BudgetPlan) -> str:
    layers, maps = plan.model.budgeted_layers, []
    if plan.importance is not None:
        relative = relative_importance(plan.importance.per_head)
        shade = importance_shade(relative)
        maps.append(heat_cells("importance", relative, layers, shade, "times the mean"))
    maps += [
        heat_cells(
            f"{percent(level.retention)} kept",
            relative_budgets(level),
            layers,
            budget_shade(),
            "times uniform",
        )
        for level in sorted_levels(plan)
    ]
    said = (
        "Each column is a KV head. Importance is a multiple of its mean, a budget one of uniform's: blue keeps less, "
        "red keeps more. Point at a cell for its number."
    )
    return f'<p class="note">{said}</p>\n<div class="beside">' + "\n".join(maps) + "</div>"


def _budgets(plan: BudgetPlan) -> Iterable[str]:
    """Per level the parameters found and every KV head's budget, folded away."""
    heads = ["layer", *(f"KV head {head}" for head in range(plan.model.num_kv_heads))]
    for level in sorted_levels(plan):
        rows: list[Sequence[str]] = [
            [str(layer), *(f"{value:.3f}" for value in row)]
            for layer, row in zip(plan.model.budgeted_layers, relative_budgets(level).tolist(), strict=True)
        ]
        parameters = ", ".join(f"{name} = {_shown(value)}" for name, value in level.allocator_params.items())
        yield (
            f"<details><summary>Budgets at {text(percent(level.retention))} kept, as multiples of uniform"
            f"{text(f' ({parameters})' if parameters else '')}</summary>\n{grid(heads, rows)}</details>"
        )
