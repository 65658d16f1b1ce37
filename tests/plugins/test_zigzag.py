import pytest
import torch
from kvpolicy_baselines.zigzag import ZigZagAllocator

from kvpolicy import Budget, Importance, PluginError, apportion
from kvpolicy.testing import check_allocator


def capacities(allocator, needed, mean, heads=2, context=10**6):
    layers = len(needed)
    budget = Budget(mean * layers * heads, (layers, heads), 1, context)
    importance = Importance(torch.rand(layers, heads), torch.tensor(needed, dtype=torch.float32))
    table = apportion(allocator.shares(importance, budget), budget)
    assert int(table.sum()) == budget.total
    return table


def equation_6(needed, mean, bound):
    """As it is written down: B_bound + (B_avg - B_bound) * L * LMBA_l / sum of LMBA."""
    return [bound + (mean - bound) * len(needed) * one / sum(needed) for one in needed]


def test_laws():
    check_allocator(ZigZagAllocator)
    check_allocator(ZigZagAllocator(floor_share=0))


def test_by_hand():
    # 10 for each, 90 * 4 = 360 in the proportions 1 : 2 : 3 : 6
    assert capacities(ZigZagAllocator(), [5, 10, 15, 30], 100)[:, 0].tolist() == [40, 70, 100, 190]


@pytest.mark.parametrize("floor_share", [0.0, 0.1, 0.4, 1.0])
def test_capacities_follow_the_equation(floor_share):
    needed = torch.randint(1, 200, (9,), generator=torch.Generator().manual_seed(1)).tolist()
    table = capacities(ZigZagAllocator(floor_share=floor_share), needed, 128)
    for row, expected in zip(table.tolist(), equation_6(needed, 128, floor_share * 128), strict=True):
        assert row == pytest.approx([expected] * 2, abs=1)


def test_without_layer_importance_the_mean_of_the_heads_counts():
    budget = Budget(800, (2, 2), 1, 800)
    shares = ZigZagAllocator(floor_share=0.5).shares(Importance(torch.tensor([[1.0, 3.0], [5.0, 7.0]])), budget)
    assert apportion(shares, budget).tolist() == [[150, 150], [250, 250]]


def test_no_need_at_all_is_uniform():
    assert capacities(ZigZagAllocator(), [0, 0, 0], 50).tolist() == [[50, 50]] * 3


@pytest.mark.parametrize("mean", [10, 33, 77, 199])
@pytest.mark.parametrize("layers", [1, 7, 30])
def test_the_total_is_exact(mean, layers):
    table = capacities(ZigZagAllocator(), torch.rand(layers).tolist(), mean, context=200)
    assert int(table.max()) <= 200 and int(table.min()) > 0


@pytest.mark.parametrize("bad", [-0.1, 1.1, float("nan")])
def test_a_bad_floor_share_is_refused(bad):
    with pytest.raises(PluginError, match="zigzag: floor_share must lie in"):
        ZigZagAllocator(floor_share=bad)
