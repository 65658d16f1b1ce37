from itertools import product

import pytest
import torch
from kvpolicy_baselines.hull import HullAllocator
from kvpolicy_baselines.power import PowerAllocator
from kvpolicy_baselines.sensitivity import SensitivityEstimator

from kvpolicy import Budget, Importance, PluginError, TransformersProbe, apportion
from kvpolicy.testing import check_allocator
from tests.plugins.test_estimator_symmetries import permuted, sharp_model, without
from tests.tiny import tiny_ids


def importance(curves, capacities):
    curves = torch.as_tensor(curves, dtype=torch.float32)
    return Importance(torch.ones(curves.shape[:2]), curves=curves, curve_capacities=torch.tensor(capacities))


def table_of(known, budget):
    table = apportion(HullAllocator().shares(known, budget), budget)
    assert int(table.sum()) == budget.total
    return table


def envelope(capacities, losses, at):
    """The greatest convex function under the curve: the lowest of all chords; level where that would rise, and beyond
    the last capacity. at: not below the first.
    """
    points = list(zip(capacities, losses, strict=True))

    def chords(x):
        return min(
            a[1] if a[0] == b[0] else a[1] + (b[1] - a[1]) * (x - a[0]) / (b[0] - a[0])
            for a, b in product(points, points)
            if a[0] <= x <= b[0]
        )

    return min(chords(y) for y in range(capacities[0], min(at, capacities[-1]) + 1))


def lowest(capacities, curves, budget):
    """The least sum of envelopes over all tables of that total without what was not measured, by enumeration."""
    floors = budget.floors().clamp(min=capacities[0]).flatten().tolist()
    ceilings = budget.ceilings().flatten().tolist()
    values = [
        {at: envelope(capacities, curve, at) for at in range(floor, ceiling + 1)}
        for curve, floor, ceiling in zip(curves, floors, ceilings, strict=True)
    ]
    sums = (
        sum(one[at] for one, at in zip(values, table, strict=True))
        for table in product(*values)
        if sum(table) == budget.total
    )
    return min(sums), values


def test_laws():
    check_allocator(HullAllocator)


def test_by_hand():
    # a saves 1 an entry up to 10, then 0.1; b saves 0.5 up to 20; both begin at 4
    known = importance([[[10.0, 4.0, 3.0], [13.0, 10.0, 5.0]]], [4, 10, 20])
    for total, expected in ((8, [4, 4]), (13, [9, 4]), (14, [10, 4]), (20, [10, 10]), (30, [10, 20]), (36, [16, 20])):
        assert table_of(known, Budget(total, (1, 2), 4, 24)).tolist() == [expected], total
    # what nobody needs goes to all alike
    assert table_of(known, Budget(44, (1, 2), 4, 24)).tolist() == [[22, 22]]


def test_entries_go_where_a_byte_saves_most():
    """As above, but an entry of a costs 4 and one of b 1: b's first 0.5 goes before a's 1."""
    known, cost = importance([[[10.0, 4.0, 3.0], [13.0, 10.0, 5.0]]], [4, 10, 20]), torch.tensor([[4, 1]])
    for total, expected in ((20, [4, 4]), (26, [4, 10]), (36, [4, 20]), (44, [6, 20]), (60, [10, 20]), (100, [20, 20])):
        budget = Budget(total, (1, 2), 4, 24, cost)
        table = apportion(HullAllocator().shares(known, budget), budget)
        assert table.tolist() == [expected], total


@pytest.mark.parametrize("kind", ["convex", "any"])
@pytest.mark.parametrize("seed", range(4))
def test_the_table_is_the_best_of_all(kind, seed):
    generator = torch.Generator().manual_seed(seed)
    capacities = [4, 6, 9, 14]
    curves = torch.rand(3, 4, generator=generator, dtype=torch.float64)
    if kind == "convex":  # slopes that rise to 0
        slopes = -curves[:, :3].sort(1, descending=True).values
        steps = slopes * torch.tensor(capacities).diff()
        curves = 9 + torch.cat([torch.zeros(3, 1), steps], 1).cumsum(1)
    curves = curves.float()  # as importance has them
    bounds = ((3, 14), (5, 12), (torch.tensor([[3, 6, 2]]), torch.tensor([[14, 9, 16]])))
    for floor, ceiling in bounds:
        least, most = torch.as_tensor(floor).clamp(min=capacities[0]), torch.as_tensor(ceiling)
        least, most = (int(bound.expand(1, 3).sum()) for bound in (least, most))
        for total in range(least, most + 1, 5):
            budget = Budget(total, (1, 3), floor, ceiling)
            table = table_of(importance(curves[None], capacities), budget).flatten().tolist()
            best, values = lowest(capacities, curves.tolist(), budget)
            found = sum(one[at] for one, at in zip(values, table, strict=True))
            assert found == pytest.approx(best, abs=1e-9), (table, total)


def test_equal_heads_get_the_same():
    curve = [3.0, 2.5, 2.4]
    known = importance([[curve, curve], [curve, [9.0, 4.0, 3.9]]], [8, 16, 64])
    assert table_of(known, Budget(53, (2, 2), 5, 64)).tolist() == [[13, 12], [12, 16]]


def test_a_curve_that_rises_gets_the_smallest_capacity_that_was_measured():
    known = importance([[[2.0, 2.1, 2.2], [2.4, 2.3, 2.2]]], [8, 16, 64])
    assert table_of(known, Budget(60, (1, 2), 5, 64)).tolist() == [[8, 52]]


def test_what_was_not_measured_is_filled_first_and_alike():
    known = importance([[[9.0, 1.0, 0.0], [9.0, 8.9, 8.8]]], [20, 30, 64])
    for total, expected in ((10, [5, 5]), (30, [15, 15]), (40, [20, 20]), (45, [25, 20])):
        assert table_of(known, Budget(total, (1, 2), 5, 64)).tolist() == [expected], total


@pytest.mark.parametrize("mean", [6, 20, 33, 64])
@pytest.mark.parametrize("layers", [1, 7, 30])
def test_the_total_is_exact(mean, layers):
    known = importance(torch.rand(layers, 3, 4), [6, 12, 24, 64])
    table = table_of(known, Budget(mean * layers * 3, (layers, 3), 5, 64))
    assert 5 <= int(table.min()) <= int(table.max()) <= 64


@pytest.mark.parametrize("points", [0, 1])
def test_importance_without_curves_is_refused(points):
    known = importance(torch.rand(1, 2, 1), [8]) if points else Importance(torch.ones(1, 2))
    with pytest.raises(PluginError, match=r"hull: the importance has no curves .* such as --estimator sensitivity"):
        HullAllocator().shares(known, Budget(40, (1, 2), 5, 64))


# --- from a model to capacities


def measured(model):
    return SensitivityEstimator().estimate(TransformersProbe(model, tiny_ids(64)))


@pytest.mark.parametrize("allocator", [PowerAllocator(floor_share=0), HullAllocator()])
def test_a_dropped_head_gets_its_floor(allocator):
    budget = Budget(9 * 16, (3, 3), 5, 64)
    kept, dropped = (
        apportion(allocator.shares(measured(model), budget), budget)
        for model in (sharp_model(), without(sharp_model(), 0, [1]))
    )
    assert int(kept[0, 1]) > 10, "or there is nothing to see"
    assert int(dropped[0, 1]) == 5
    assert int(dropped.sum()) == budget.total


@pytest.mark.parametrize("allocator", [PowerAllocator(), HullAllocator()])
def test_capacities_go_with_their_kv_heads(allocator):
    orders = torch.tensor([[1, 2, 0], [2, 0, 1], [0, 2, 1]])
    budget = Budget(9 * 16, (3, 3), 5, 64)
    before, after = (
        apportion(allocator.shares(measured(model), budget), budget)
        for model in (sharp_model(), permuted(sharp_model(), orders))
    )
    assert torch.equal(after, before.gather(1, orders))
    assert not torch.equal(after, before), "or there is nothing to see"
