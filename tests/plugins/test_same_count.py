import pytest
import torch
from kvpolicy_baklava.allocator import BaklavaAllocator
from kvpolicy_baselines.keydiff import KeyDiffPolicy
from kvpolicy_baselines.same_count import SameCountAllocator
from kvpolicy_baselines.uniform import UniformAllocator

import kvpolicy
from kvpolicy import Budget, Importance, PluginError, apportion
from kvpolicy.testing import check_allocator
from tests.plugins.direct import ids_of, kept
from tests.tiny import over, tiny_model

IMPORTANCE = Importance(torch.tensor([[1.0, 3.0], [0.5, 0.1], [2.0, 2.0]]))


def budget(total, ceiling=200):
    return Budget(total, (3, 2), 1, ceiling)


@pytest.mark.parametrize("allocator", [SameCountAllocator(), SameCountAllocator(0.0), SameCountAllocator(-3.0)])
def test_laws(allocator):
    check_allocator(allocator)


@pytest.mark.parametrize("exponent", [-2.0, 0.5, 1.0, 3.0])
def test_a_layer_gets_what_its_heads_would(exponent):
    shares = SameCountAllocator(exponent).shares(IMPORTANCE, budget(100))
    sums = [sum(x**exponent for x in row) for row in IMPORTANCE.per_head.double().tolist()]
    for layer, row in enumerate((shares / shares.sum()).tolist()):
        assert row == pytest.approx([sums[layer] / sum(sums) / 2] * 2)


def test_layer_sums_are_those_of_counts_per_head():
    per_head = BaklavaAllocator(floor_share=0.0).shares(IMPORTANCE, budget(86))
    head_counts = apportion(per_head, budget(86))
    layer_counts = apportion(SameCountAllocator().shares(IMPORTANCE, budget(86)), budget(86))
    assert head_counts.tolist() == [[10, 30], [5, 1], [20, 20]]
    assert layer_counts.tolist() == [[20, 20], [3, 3], [20, 20]]


@pytest.mark.parametrize("total", range(86, 98))
def test_the_total_is_exact_and_counts_differ_by_layer_alone(total):
    counts = apportion(SameCountAllocator().shares(IMPORTANCE, budget(total)), budget(total))
    assert int(counts.sum()) == total
    assert int((counts[:, 0] - counts[:, 1]).abs().max()) <= 1
    assert int((counts[:, 0] != counts[:, 1]).sum()) == total % 2, "only an odd total needs a head with one more"


def test_exponent_0_is_uniform():
    for total in (60, 61, 64):
        same = apportion(SameCountAllocator(0.0).shares(IMPORTANCE, budget(total)), budget(total))
        assert torch.equal(same, apportion(UniformAllocator().shares(IMPORTANCE, budget(total)), budget(total)))


def test_heads_of_a_layer_keep_as_many_entries_but_not_the_same():
    model = tiny_model("Llama")
    shares = SameCountAllocator().shares(IMPORTANCE, budget(100))
    table = apportion(shares, budget(172, ceiling=100))
    plan = kvpolicy.BudgetPlan.from_capacities(kvpolicy.ModelSpec.from_config(model.config), table, context_length=100)
    cache = kvpolicy.new_cache(model, plan, policy=KeyDiffPolicy(), min_tokens=8)
    with torch.no_grad():
        model(ids_of(100), **over(cache))
    positions = kept(cache)
    assert cache.lengths[:, 0].tolist() == table.tolist()
    for layer, (one, two) in enumerate(table.tolist()):
        assert one == two
        assert positions[layer, 0] != positions[layer, 1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_exponent_is_refused(bad):
    with pytest.raises(PluginError, match="same_count: exponent must be a finite number"):
        SameCountAllocator(bad)
