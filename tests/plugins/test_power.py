import pytest
import torch
from kvpolicy_baselines.power import PowerAllocator

from kvpolicy import Budget, Importance, PluginError, apportion
from kvpolicy.testing import check_allocator

SCORES = [[0.02, 0.3, 0.0], [0.2, 0.25, 0.6]]


def shares(allocator, scores, mean=100):
    scores = torch.as_tensor(scores, dtype=torch.float32)
    return allocator.shares(Importance(scores), Budget(mean * scores.numel(), tuple(scores.shape), 1, 10**6))


def raised(scores, exponent, floor):
    """max(floor, multiple * score^exponent) with mean 1; the multiple by bisection."""
    weights = [s**exponent for row in scores for s in row]
    low, high = 0.0, 1e12
    for _ in range(300):
        middle = (low + high) / 2
        over = sum(max(floor, middle * w) for w in weights) > len(weights)
        low, high = (low, middle) if over else (middle, high)
    return [max(floor, low * w) for w in weights]


def test_laws():
    check_allocator(PowerAllocator)
    check_allocator(PowerAllocator(exponent=0, floor_share=0))
    check_allocator(PowerAllocator(exponent=50, floor_share=1))


def test_by_hand():
    # 40 of 400 for the last, 360 left: 1 : 4 : 4 would be 40 : 160 : 160
    assert shares(PowerAllocator(2, 0.4), [[1, 2], [2, 0]]).tolist() == [[0.4, 1.6], [1.6, 0.4]]


@pytest.mark.parametrize("exponent", [0.5, 1, 3])
@pytest.mark.parametrize("floor_share", [0, 0.1, 0.5, 0.9])
def test_shares_are_the_raised_powers(exponent, floor_share):
    found = shares(PowerAllocator(exponent, floor_share), SCORES)
    assert found.flatten().tolist() == pytest.approx(raised(SCORES, exponent, floor_share), rel=1e-6, abs=1e-9)
    assert float(found.mean()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("scores", "allocator"),
    [
        ([[0.0] * 3] * 2, PowerAllocator()),
        ([[0.3] * 3] * 2, PowerAllocator(4)),
        (SCORES, PowerAllocator(0)),
        (SCORES, PowerAllocator(3, 1)),
    ],
)
def test_uniform_where_nothing_tells_heads_apart(scores, allocator):
    assert shares(allocator, scores).flatten().tolist() == pytest.approx([1.0] * 6)


def test_large_exponents_stay_finite():
    found = shares(PowerAllocator(400, 0.25), [[1e-3, 1e-5]])
    assert found.tolist() == [[1.75, 0.25]]


@pytest.mark.parametrize("mean", [20, 33, 77, 199])
@pytest.mark.parametrize("layers", [1, 7, 30])
def test_the_total_is_exact(mean, layers):
    scores = torch.rand(layers, 3)
    budget = Budget(mean * layers * 3, (layers, 3), 5, 200)
    table = apportion(PowerAllocator(2).shares(Importance(scores), budget), budget)
    assert int(table.sum()) == budget.total and 5 <= int(table.min()) <= int(table.max()) <= 200


@pytest.mark.parametrize(
    "bad",
    [
        {"exponent": -0.1},
        {"exponent": float("nan")},
        {"exponent": float("inf")},
        {"floor_share": -0.1},
        {"floor_share": 1.1},
    ],
)
def test_bad_parameters_are_refused(bad):
    with pytest.raises(PluginError, match="power: exponent must be finite and >= 0, floor_share must lie"):
        PowerAllocator(**bad)
