"""Agreement of rankings, as tables in the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rich.table import Table
from rich.text import Text
from torch import Tensor

from kvpolicy.measure.agreement import Agreement, pairs
from kvpolicy.measure.ranks import chance_correlation


def tables(found: Agreement) -> Iterator[Table | Text]:
    """Each estimator with itself on other prompts and texts, each with each, and what must be said besides."""
    itself = Table(
        "",
        "estimator",
        "prompts",
        "least",
        "texts",
        "least",
        title="each with itself: mean and least of all pairs",
        title_justify="left",
    )
    each = Table("", *_numbers(found), title="estimators with each other", title_justify="left")
    for number, name, prompt, text, row in zip(
        _numbers(found), found.estimators, found.prompt, found.text, found.estimator.tolist(), strict=True
    ):
        itself.add_row(number, name, *_mean_and_least(prompt), *_mean_and_least(text))
        each.add_row(number, *("" if math.isnan(value) else f"{value:+.2f}" for value in row))
    yield itself
    yield each
    yield Text(
        f"Spearman's rank correlation of {found.num_heads} KV heads; unrelated rankings stay within "
        f"{chance_correlation(found.num_heads):.2f} of 0 in 95 % of cases. Estimators with each other, and prompts: on "
        f"{found.texts[0]}. Texts: {'; '.join(found.texts)}."
    )
    for where, reason in found.failures.items():
        yield Text(f"no ranking: {where}: {reason}")


def _numbers(found: Agreement) -> list[str]:
    return [str(number) for number in range(1, len(found.estimators) + 1)]


def _mean_and_least(matrix: Tensor) -> tuple[str, str]:
    values = pairs(matrix)
    return (f"{sum(values) / len(values):+.2f}", f"{min(values):+.2f}") if values else ("", "")
