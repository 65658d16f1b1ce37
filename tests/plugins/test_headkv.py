import pytest
import torch
from kvpolicy_baselines.headkv import HeadKVAllocator

from kvpolicy import Budget, Importance, PluginError, apportion
from kvpolicy.testing import check_allocator


def capacities(allocator, scores, mean, context=10**6):
    scores = torch.as_tensor(scores, dtype=torch.float32)
    budget = Budget(mean * scores.numel(), tuple(scores.shape), 1, context)
    table = apportion(allocator.shares(Importance(scores), budget), budget)
    assert int(table.sum()) == budget.total
    return table


def in_whole_numbers(scores, mean, window, beta, temperature):
    """The reference implementation's arithmetic, head by head."""
    base = mean - window
    flat = [s for row in scores for s in row]
    weight = [(s / sum(flat)) ** temperature for s in flat]
    pool = (base // beta) * len(flat)
    least = base - base // beta
    return [round(w / sum(weight) * pool + least) + window for w in weight]


SCORES = [[0.1, 0.3, 0.05], [0.2, 0.25, 0.6]]


def test_laws():
    check_allocator(HeadKVAllocator)
    check_allocator(HeadKVAllocator(beta=1, window=0))
    check_allocator(HeadKVAllocator(beta=5, temperature=0.5))


def test_by_hand():
    # 100 beside the window; 50 each stay, the pool of 4 * 50 goes by 1 : 1 : 2 : 4
    allocator = HeadKVAllocator(beta=2, window=28)
    assert capacities(allocator, [[0.1, 0.1], [0.2, 0.4]], 128).tolist() == [[103, 103], [128, 178]]


@pytest.mark.parametrize("temperature", [0.5, 1, 2])
@pytest.mark.parametrize(("mean", "window", "beta"), [(132, 32, 2), (132, 32, 5), (92, 32, 10), (64, 0, 1)])
def test_capacities_are_the_references_where_its_parts_divide(mean, window, beta, temperature):
    expected = in_whole_numbers(SCORES, mean, window, beta, temperature)
    table = capacities(HeadKVAllocator(beta=beta, temperature=temperature, window=window), SCORES, mean)
    # the reference rounds each head by itself: the exact total may move one of them by one
    assert table.flatten().tolist() == pytest.approx(expected, abs=1)
    assert sum(a != b for a, b in zip(table.flatten().tolist(), expected, strict=True)) <= abs(sum(expected) - mean * 6)


def test_large_exponents_stay_finite():
    shares = HeadKVAllocator(temperature=400.0).shares(
        Importance(torch.tensor([[1e-3, 1e-5]])), Budget(200, (1, 2), 1, 200)
    )
    assert bool(shares.isfinite().all()) and shares[0, 0] > shares[0, 1] > 0


@pytest.mark.parametrize("mean", [20, 32])
def test_uniform_where_there_is_nothing_to_share(mean):
    assert capacities(HeadKVAllocator(), SCORES, mean).tolist() == [[mean] * 3] * 2


def test_uniform_where_no_score_is_above_zero():
    assert capacities(HeadKVAllocator(), [[0.0] * 3] * 2, 100).tolist() == [[100] * 3] * 2


@pytest.mark.parametrize("mean", [33, 50, 77, 199])
@pytest.mark.parametrize("layers", [1, 7, 30])
def test_the_total_is_exact(mean, layers):
    table = capacities(HeadKVAllocator(), torch.rand(layers, 3), mean, context=200)
    assert int(table.max()) <= 200 and int(table.min()) > 0


@pytest.mark.parametrize(
    "bad", [{"beta": 0.9}, {"beta": float("nan")}, {"temperature": 0.0}, {"temperature": -1.0}, {"window": -1}]
)
def test_bad_parameters_are_refused(bad):
    with pytest.raises(PluginError, match="headkv: beta must be >= 1"):
        HeadKVAllocator(**bad)
