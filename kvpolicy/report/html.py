"""A plan as one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from html import escape

from kvpolicy.budget.plan import BudgetPlan
from kvpolicy.report.numbers import method, model_name, percent, relative_budgets, sorted_levels
from kvpolicy.report.tables import LEVEL_COLUMNS, level_rows, summary_rows, warnings_of

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 2rem auto; max-width: 72rem;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; } th, td { padding: .25rem .75rem; border-bottom: 1px solid #ddd; }
th { text-align: left; font-weight: 600; } td { text-align: right; font-variant-numeric: tabular-nums; }
table.facts td { text-align: left; overflow-wrap: anywhere; } .wide { overflow-x: auto; }
img { max-width: 100%; height: auto; } pre { white-space: pre-wrap; overflow-wrap: anywhere; }
"""


def plan_html(plan: BudgetPlan) -> str:
    """The whole document: heat maps, levels, budgets of every KV head, provenance. All texts are escaped."""
    from kvpolicy.report.heatmap import plan_png  # matplotlib takes a second to import

    title = escape(f"KV budgets: {model_name(plan)}")
    picture = base64.b64encode(plan_png(plan)).decode()
    alt = escape(f"Heat maps of importance and budgets, {method(plan)}")
    sections = [
        f"<h1>{title}</h1>",
        _facts(summary_rows(plan)),
        "<h2>Levels</h2>",
        _levels(plan),
        *(f"<p>{escape(line)}</p>" for line in warnings_of(plan)),
        "<h2>Heat maps</h2>",
        f'<p><img alt="{alt}" src="data:image/png;base64,{picture}"></p>',
        *_budgets(plan),
        "<h2>Provenance</h2>",
        _facts((str(name), _shown(value)) for name, value in plan.provenance.items()),
    ]
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{title}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n" + "\n".join(sections) + "\n</body>\n</html>\n"
    )


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _facts(rows: Iterable[tuple[str, str]]) -> str:
    body = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>\n" for name, value in rows)
    return f'<table class="facts">\n{body}</table>'


def _grid(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>\n" for row in rows)
    return f'<div class="wide"><table>\n<tr>{head}</tr>\n{body}</table></div>'


def _levels(plan: BudgetPlan) -> str:
    rows = level_rows(plan)
    columns = [(head, key) for head, key in LEVEL_COLUMNS if any(row.get(key) for row in rows)]
    return _grid([head for head, _ in columns], [[row.get(key, "") for _, key in columns] for row in rows])


def _budgets(plan: BudgetPlan) -> Iterable[str]:
    """Per level the parameters found and every KV head's budget, folded away."""
    heads = ["layer", *(f"KV head {head}" for head in range(plan.model.num_kv_heads))]
    for level in sorted_levels(plan):
        rows = [
            [str(layer), *(f"{value:.3f}" for value in row)]
            for layer, row in zip(plan.model.budgeted_layers, relative_budgets(level).tolist(), strict=True)
        ]
        parameters = ", ".join(f"{name} = {_shown(value)}" for name, value in level.allocator_params.items())
        yield (
            f"<details><summary>Budgets at {escape(percent(level.retention))} kept, as multiples of uniform"
            f"{escape(f' ({parameters})' if parameters else '')}</summary>\n{_grid(heads, rows)}</details>"
        )
