"""Formats and capacities at a total of bytes: nothing that spends as much loses less."""

import itertools

import pytest
import torch

from kvpolicy import BudgetError
from kvpolicy.budget.format_choice import FormatCurves, choose_formats

POINTS = torch.tensor([8, 16, 40])


def drawn(seed, *, layers=2, heads=2):
    generator = torch.Generator().manual_seed(seed)
    losses = torch.rand(2, layers, heads, 3, generator=generator).sort(-1, descending=True).values
    losses[0, ..., -1] = 0
    return {
        "model": FormatCurves(losses[0], cost=20, fixed=0, least=5),
        "int4": FormatCurves(losses[1] * 0.5, cost=7, fixed=60, least=16),
    }


def spent(curves, formats, places):
    """(bytes, loss) of a choice. places: of each layer, the point of each head; None where that cannot be."""
    total, loss = 0, 0.0
    for layer, (name, row) in enumerate(zip(formats, places, strict=True)):
        own = curves[name]
        if any(int(POINTS[place]) < own.least for place in row):
            return None
        total += own.fixed + own.cost * sum(int(POINTS[place]) for place in row)
        loss += sum(float(own.losses[layer, head, place]) for head, place in enumerate(row))
    return total, loss


@pytest.mark.parametrize("seed", range(8))
def test_nothing_that_takes_no_more_bytes_loses_less(seed):
    curves = drawn(seed)
    rows = list(itertools.product(range(3), repeat=2))
    every = [
        found
        for formats in itertools.product(curves, repeat=2)
        for places in itertools.product(rows, repeat=2)
        if (found := spent(curves, formats, places)) is not None
    ]
    cheapest = min(total for total, _ in every)
    for total in range(cheapest, 3600, 150):
        choice = choose_formats(curves, POINTS, total)
        places = [[POINTS.tolist().index(capacity) for capacity in row] for row in choice.capacities.tolist()]
        used, loss = spent(curves, choice.formats, places)
        assert used <= total and loss == pytest.approx(choice.loss)
        assert loss <= min(other for taken, other in every if taken <= used) + 1e-6
    assert choice.loss == pytest.approx(min(loss for _, loss in every)), "in the end everything goes in"


def test_more_bytes_never_lose_more():
    curves = drawn(3, layers=6, heads=3)
    losses = [choose_formats(curves, POINTS, total).loss for total in range(4000, 15000, 500)]
    assert losses == sorted(losses, reverse=True) and len(set(losses)) > 8


def test_too_few_bytes_are_refused():
    with pytest.raises(BudgetError, match="100 bytes are fewer than the 568 that the smallest capacities take"):
        choose_formats(drawn(0), POINTS, 100)
