import pytest
import torch
from kvpolicy_baselines.pyramid import PyramidAllocator

from kvpolicy import Budget, Importance, PluginError, apportion
from kvpolicy.testing import check_allocator
from tests.plugins.direct import after_prompt, assert_keeps_the_best, ids_of
from tests.plugins.test_snapkv import formula


def capacities(allocator, mean, layers, context=10**6, heads=2):
    budget = Budget(mean * layers * heads, (layers, heads), 1, context)
    table = apportion(allocator.shares(Importance(torch.ones(layers, heads)), budget), budget)
    assert int(table.sum()) == budget.total
    assert bool((table.diff(dim=0) <= 0).all()), "no layer gets more than the one before"
    return table


def in_whole_numbers(mean, window, beta, layers, tokens):
    """The reference implementation's arithmetic, which is exact where its steps divide."""
    base = mean - window
    low = base // beta
    high = 2 * base - low
    if high >= tokens - window:
        high = tokens - window
        low = 2 * base - high
    step = (high - low) // (layers - 1)
    assert step * (layers - 1) == high - low
    return [high - layer * step + window for layer in range(layers)]


def test_laws():
    check_allocator(PyramidAllocator)
    check_allocator(PyramidAllocator(window=0))


@pytest.mark.parametrize(
    ("mean", "window", "beta", "layers", "tokens"),
    [(132, 32, 20, 11, 5000), (132, 32, 20, 6, 5000), (108, 8, 2, 5, 5000), (132, 32, 20, 5, 212), (64, 0, 4, 4, 128)],
)
def test_capacities_are_the_references_where_its_steps_divide(mean, window, beta, layers, tokens):
    expected = in_whole_numbers(mean, window, beta, layers, tokens)
    table = capacities(PyramidAllocator(beta=beta, window=window), mean, layers, tokens)
    assert table.tolist() == [[x, x] for x in expected]
    assert expected[0] > mean > expected[-1]


def test_by_hand():
    # 68 beside the window; the last layer 68 / 4 = 17, the first 2 * 68 - 17 = 119
    assert capacities(PyramidAllocator(beta=4), 100, 3)[:, 0].tolist() == [151, 100, 49]
    assert capacities(PyramidAllocator(beta=4), 100, 3, context=120)[:, 0].tolist() == [120, 100, 80]


@pytest.mark.parametrize("mean", [33, 50, 77, 100, 128, 199])
@pytest.mark.parametrize("layers", [1, 2, 7, 30])
def test_the_total_is_exact_where_steps_do_not_divide(mean, layers):
    table = capacities(PyramidAllocator(), mean, layers, context=200)
    assert int(table.max()) <= 200 and int(table.min()) > 0


@pytest.mark.parametrize(("mean", "context"), [(20, 500), (32, 500), (200, 200)])
def test_uniform_where_there_is_nothing_to_shift(mean, context):
    assert capacities(PyramidAllocator(), mean, 4, context).tolist() == [[mean] * 2] * 4


def test_a_cache_keeps_snapkvs_best_under_a_pyramid():
    cache = assert_keeps_the_best(
        "snapkv", formula(32, 5, "avg"), length=200, retention=0.4, recent=32, allocator="pyramid"
    )
    # a mean of 80 is 48 beside the window; the last layer gets 48 / 20 = 2.4 of that, the first 96 - 2.4 = 93.6
    assert cache.capacities[:, 0, 0].tolist() == pytest.approx([125.6, 80, 34.4], abs=0.5)
    assert int(cache.lengths.sum()) == 480


def test_window_zero_under_another_policy():
    cache = after_prompt(ids_of(60), "h2o", retention=0.3, allocator=PyramidAllocator(window=0))
    assert cache.lengths[:, 0, 0].tolist() == pytest.approx([35.1, 18, 0.9], abs=0.5)
    assert int(cache.lengths.sum()) == 108


@pytest.mark.parametrize("bad", [{"beta": 0.5}, {"window": -1}, {"beta": float("nan")}])
def test_bad_parameters_are_refused(bad):
    with pytest.raises(PluginError, match="pyramid: beta must be >= 1"):
        PyramidAllocator(**bad)
