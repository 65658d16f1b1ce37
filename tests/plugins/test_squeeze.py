from itertools import product

import pytest
import torch
from kvpolicy_baselines.squeeze import SqueezeAllocator
from scipy.cluster.vq import kmeans2

from kvpolicy import Budget, Importance, PluginError, apportion
from kvpolicy.testing import check_allocator


def capacities(allocator, values, mean=100, heads=2, context=10**6):
    layers = len(values)
    budget = Budget(round(mean * layers * heads), (layers, heads), 1, context)
    importance = Importance(torch.rand(layers, heads), torch.tensor(values))
    table = apportion(allocator.shares(importance, budget), budget)
    assert int(table.sum()) == budget.total
    return table


def least_important(values, clusters=3):
    """The layers of the cluster with the lowest mean, of the best of all ways to give layers to clusters."""

    def cost(labels):
        parts = [[v for v, label in zip(values, labels, strict=True) if label == c] for c in range(clusters)]
        if not all(parts):
            return float("inf")
        return sum(sum((v - sum(part) / len(part)) ** 2 for v in part) for part in parts)

    best = min(product(range(clusters), repeat=len(values)), key=cost)
    lowest = best[values.index(min(values))]
    return [layer for layer, label in enumerate(best) if label == lowest]


def given_less(table):
    return [layer for layer, row in enumerate(table.tolist()) if row[0] < table.double().mean()]


def test_laws():
    check_allocator(SqueezeAllocator)
    check_allocator(SqueezeAllocator(percent=0))


def test_capacities_are_the_references_arithmetic():
    """A mean of 0.4 of a prompt of 1000, and 0.25 for the least important layers: `percent` is 0.625 here."""
    values = [0.9, 0.1, 0.11, 0.5, 0.12, 0.52, 0.91, 0.1]
    ini_size, percent, prompt = 0.4, 0.25, 1000
    other = (len(values) * ini_size - 4 * percent) / 4  # 0.55
    expected = [percent if v < 0.2 else other for v in values]
    table = capacities(SqueezeAllocator(percent=percent / ini_size), values, mean=ini_size * prompt, context=prompt)
    assert table.tolist() == [[round(x * prompt)] * 2 for x in expected]


@pytest.mark.parametrize("seed", range(12))
def test_clusters_are_the_best_of_all(seed):
    values = torch.rand(8, generator=torch.Generator().manual_seed(seed)).tolist()
    if seed % 3 == 0:
        values = [round(v, 1) for v in values]  # with equal ones
    assert given_less(capacities(SqueezeAllocator(), values)) == least_important(values)


@pytest.mark.parametrize("seed", range(6))
def test_no_start_of_k_means_finds_better_clusters(seed):
    values = torch.rand(30, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()
    runs = []
    for start in range(40):
        centres, labels = kmeans2(values.double().numpy()[:, None], 3, iter=100, minit="++", seed=start)
        cost = sum(float((values[i].double() - centres[label, 0]) ** 2) for i, label in enumerate(labels))
        runs.append((cost, [i for i, label in enumerate(labels) if label == centres[:, 0].argmin()]))
    assert given_less(capacities(SqueezeAllocator(), values.tolist())) == min(runs)[1]


def test_two_clusters_and_one():
    assert capacities(SqueezeAllocator(), [0.2, 0.7, 0.2, 0.7])[:, 0].tolist() == [50, 150, 50, 150]
    assert capacities(SqueezeAllocator(), [0.2, 0.7])[:, 0].tolist() == [50, 150]
    assert capacities(SqueezeAllocator(), [0.3] * 5)[:, 0].tolist() == [100] * 5
    assert capacities(SqueezeAllocator(), [0.3])[:, 0].tolist() == [100]


def test_nearly_equal_values_are_clustered_too():
    values = torch.tensor([1.0, 1.0 + 2**-22, 1.0 + 2**-20, 1.0 + 3 * 2**-20]).tolist()
    assert given_less(capacities(SqueezeAllocator(), values)) == [0, 1]


def test_without_layer_importance_the_mean_of_the_heads_counts():
    per_head = torch.tensor([[0.0, 0.2], [0.9, 0.1], [0.6, 0.4], [0.1, 0.1]])
    budget = Budget(800, (4, 2), 1, 400)
    shares = SqueezeAllocator(percent=0.2).shares(Importance(per_head), budget)
    assert apportion(shares, budget).tolist() == [[20, 20], [180, 180], [180, 180], [20, 20]]


@pytest.mark.parametrize("mean", [10, 33, 77, 199])
@pytest.mark.parametrize("layers", [2, 7, 30])
def test_the_total_is_exact(mean, layers):
    table = capacities(SqueezeAllocator(percent=0.3), torch.rand(layers).tolist(), mean=mean, context=200)
    assert int(table.max()) <= 200 and int(table.min()) > 0


@pytest.mark.parametrize("bad", [-0.1, 1.1, float("nan")])
def test_a_bad_percent_is_refused(bad):
    with pytest.raises(PluginError, match="squeeze: percent must lie in"):
        SqueezeAllocator(percent=bad)
