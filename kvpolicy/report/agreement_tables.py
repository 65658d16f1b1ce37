"""Agreement of rankings, as tables in the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rich.text import Text
from torch import Tensor

from kvpolicy.measure.agreement import Agreement, pairs
from kvpolicy.measure.ranks import chance_correlation
from kvpolicy.report.grid import Grid


def tables(agreement: Agreement) -> Iterator[Grid | Text]:
    """Each estimator with itself on other prompts and texts, each with each, and what must be said besides."""
    numbers = _numbers(agreement)
    itself = [
        (f"{number} {name}", *_mean_and_least(prompt), *_mean_and_least(text))
        for number, name, prompt, text in zip(
            numbers, agreement.estimators, agreement.prompt, agreement.text, strict=True
        )
    ]
    pairs = [
        (number, *("" if math.isnan(value) else f"{value:+.2f}" for value in row))
        for number, row in zip(numbers, agreement.estimator.tolist(), strict=True)
    ]
    title = "each with itself: mean and least of all pairs"
    yield Grid(["estimator", "prompts", "least", "texts", "least"], itself, title=title)
    yield Grid(["", *numbers], pairs, title="estimators with each other")
    yield Text(
        f"Spearman's rank correlation of {agreement.num_heads} KV heads; unrelated rankings stay within "
        f"{chance_correlation(agreement.num_heads):.2f} of 0 in 95 % of cases. Estimators with each other, and "
        f"prompts: on {agreement.texts[0]}. Texts: {'; '.join(agreement.texts)}."
    )
    for where, reason in agreement.failures.items():
        yield Text(f"no ranking: {where}: {reason}")


def _numbers(agreement: Agreement) -> list[str]:
    return [str(number) for number in range(1, len(agreement.estimators) + 1)]


def _mean_and_least(matrix: Tensor) -> tuple[str, str]:
    values = pairs(matrix)
    return (f"{sum(values) / len(values):+.2f}", f"{min(values):+.2f}") if values else ("", "")
