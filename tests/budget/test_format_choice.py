"""Formats and capacities at a total of bytes: nothing that spends as much loses less."""

import itertools

import pytest
import torch

from kvpolicy import BudgetError
from kvpolicy.budget.format_choice import FormatCurves, choose_formats, lost_beside

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


def drawn_together(seed, *, layers, heads):
    """Of changes of the log-probability at 30 tokens: (curves of one head alone, what two of them lose together)."""
    change = torch.randn(layers * heads, 30, generator=torch.Generator().manual_seed(seed))
    change = change[:, None] * torch.tensor([1.0, 0.4, 0.0])[:, None]  # [L * H, K, 30]
    both = (change.flatten(0, 1) @ change.flatten(0, 1).mT).unflatten(1, (-1, 3)).unflatten(0, (-1, 3))
    alone = both.diagonal(dim1=0, dim2=2).diagonal(dim1=0, dim2=1).clone()  # [L * H, K]
    both.diagonal(dim1=0, dim2=2).zero_()
    shape = layers, heads, 3
    return FormatCurves(alone.reshape(shape), cost=20, fixed=0, least=5), both.reshape(*shape, *shape)


def joint(curves, together, capacities):
    place = torch.searchsorted(POINTS, capacities)
    return float((curves.losses + lost_beside(together, place)).gather(-1, place[..., None]).sum())


def test_what_heads_lose_together_is_counted_at_what_they_are_given():
    better = 0
    for seed in range(12):
        curves, together = drawn_together(seed, layers=2, heads=3)
        for total in (1400, 2000, 2600):
            alone = choose_formats({"model": curves}, POINTS, total)
            both = choose_formats({"model": curves}, POINTS, total, together)
            spent = 20 * int(both.capacities.sum())
            assert spent <= total
            assert both.loss == pytest.approx(joint(curves, together, both.capacities), rel=1e-4)
            before = joint(curves, together, alone.capacities)
            assert both.loss <= before + 1e-4, "the first round is that of heads alone"
            better += both.loss < 0.95 * before
    assert better > 12


def test_nothing_lost_together_changes_nothing():
    curves = drawn(1)
    alone = choose_formats(curves, POINTS, 2000)
    both = choose_formats(curves, POINTS, 2000, torch.zeros(2, 2, 3, 2, 2, 3))
    assert both.formats == alone.formats and torch.equal(both.capacities, alone.capacities)
    assert both.loss == pytest.approx(alone.loss)
    chosen = torch.stack([curves[name].losses[layer] for layer, name in enumerate(both.formats)])
    assert torch.equal(both.curves, chosen)
