import pytest
import torch
from kvpolicy_baselines.fisher import FisherEstimator, changes, costs, products
from kvpolicy_baselines.hull import HullAllocator
from kvpolicy_kernels.formats import INT4, INT8

from kvpolicy import Budget, LayerGradients, PluginError, TransformersProbe, apportion
from kvpolicy.budget.entry_format import LayerFormats
from kvpolicy.budget.format_choice import lost_beside
from kvpolicy.testing import SyntheticProbe, check_estimator
from kvpolicy.tuning.auto_formats import EveryFormat
from tests.plugins.test_estimator_symmetries import sharp_model
from tests.tiny import tiny_ids


def test_laws():
    check_estimator(FisherEstimator)
    check_estimator(FisherEstimator(sizes=(0.5,), size=0.5, seed=3))


@pytest.mark.parametrize("sinks", [0.0, 0.3])
@pytest.mark.parametrize("first", [0, 150])
def test_changes_are_those_of_attention_over_what_is_kept(first, sinks):
    """Two KV heads of three query heads, ranks of each head's own, blocks of queries, and mass that a sink takes."""
    length, heads, group = 200, 2, 3
    torch.manual_seed(0)
    logits = torch.randn(heads * group, length, length)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    weights = logits.masked_fill(~causal, float("-inf")).softmax(-1) * (1 - sinks)
    values, gradients = torch.randn(heads, length, 8), torch.randn(heads * group, length, 8)
    rank = torch.stack([torch.randperm(length) for _ in range(heads)]) - 4
    rank = rank.clamp(min=-1)[:, None].expand(-1, length, -1)
    part = LayerGradients(0, first, gradients, values, lambda b, e: weights[:, b:e, :e], lambda b, e: rank[:, b:e, :e])
    kept = torch.tensor([1, 20, 150])
    found = costs(changes(part, kept), len(kept) - 1)[0]
    for place, count in enumerate(kept.tolist()):
        seen = (rank < count).repeat_interleave(group, 0) & causal
        own = values.repeat_interleave(group, 0).double()
        total = weights.double().masked_fill(~seen, 0.0)
        sink = 1 - weights.double().sum(-1, keepdim=True)
        after = total / (total.sum(-1, keepdim=True) + sink * (sinks > 0)).clamp(min=1e-30)
        change = ((after - weights.double()) @ own * gradients).sum(-1)[:, first:]
        expected = change.unflatten(0, (heads, group)).sum(1).square().sum(1)
        torch.testing.assert_close(found[:, place], expected, rtol=1e-4, atol=1e-6)


def test_curves_are_the_divergence_of_a_head_alone():
    """Over many draws: the smaller the change, the closer; large ones are taken for larger than they are."""
    probe = TransformersProbe(sharp_model(), tiny_ids(64))
    sizes = (0.25, 0.5, 0.75)
    found = torch.stack([FisherEstimator(sizes, 0.5, seed, 1.0).estimate(probe).curves for seed in range(40)]).mean(0)
    exact = torch.zeros_like(found)
    for layer in range(3):
        for head in range(3):
            for place, size in enumerate(sizes):
                exact[layer, head, place] = divergence(probe, layer, head, round(64 * size))
    assert (found[..., -1] == 0).all()
    ratio = found[..., :-1].sum((0, 1)) / exact[..., :-1].sum((0, 1))
    assert 0.9 < ratio[2] < 1.2
    assert 0.9 < ratio[0] < 2.0
    order = torch.corrcoef(torch.stack([found[..., :-1].flatten(), exact[..., :-1].flatten()]))[0, 1]
    assert order > 0.9


def test_curves_at_what_the_others_keep_sum_to_the_divergence_of_the_table():
    """Over many draws: nothing that heads lose together is left out or counted twice."""
    probe = TransformersProbe(sharp_model(), tiny_ids(64))
    exact = float(probe.soft_loss(lambda _, rank: hidden_beyond(rank, 48 - probe.num_sink_tokens)))
    found = torch.stack([FisherEstimator((0.75,), 0.75, seed, 0.75).estimate(probe).per_head for seed in range(20)])
    assert 0.9 < float(found.mean(0).sum()) / exact < 1.6


def test_half_of_what_two_heads_lose_together():
    change = torch.tensor([[2.0, 0.0], [0.5, 0.0], [-1.0, 0.0]])[None, :, None]  # three heads, one query
    assert costs(change, 1)[0, :, 0].tolist() == [4.0, 0.25, 1.0]
    assert costs(change, 0)[0, :, 0].tolist() == [2 * 1.5, 0.5 * 1.5, -1.0 * 1.5]


def test_what_two_heads_lose_together_is_that_of_any_two_capacities():
    change = torch.randn(2, 3, 50, 4, generator=torch.Generator().manual_seed(0))
    both = products(change)
    assert both.shape == (2, 3, 4, 2, 3, 4)
    assert float(both[1, 2, 3, 0, 1, 2]) == pytest.approx(float(change[1, 2, :, 3] @ change[0, 1, :, 2]), rel=1e-4)
    assert (both[1, 2, :, 1, 2] == 0).all(), "a head with itself"
    place = torch.full((2, 3), 1)
    alone = change.square().sum(2)
    torch.testing.assert_close(alone + lost_beside(both, place), costs(change, 1).float(), rtol=1e-4, atol=1e-3)


def test_curves_of_formats_are_of_one_head_alone():
    probe = EveryFormat(TransformersProbe(sharp_model(), tiny_ids(64)))
    found = FisherEstimator((0.25, 0.75), 0.75).estimate(probe)
    alone = FisherEstimator((0.25, 0.75), 0.75, others=1).estimate(probe)
    for name, curves in found.format_curves.items():
        assert torch.equal(curves, alone.format_curves[name])
    torch.testing.assert_close(alone.curves, found.format_curves["model"])
    beside = lost_beside(found.together, torch.zeros(3, 3, dtype=torch.int64))
    torch.testing.assert_close((alone.curves + beside).clamp(min=0), found.curves, rtol=1e-4, atol=1e-6)


def test_curves_of_formats_are_the_divergence_of_a_coded_layer():
    """With nothing evicted, over many draws: what the codes of one layer do."""
    model, ids = sharp_model().double(), tiny_ids(64)
    probe = EveryFormat(TransformersProbe(model, ids))
    curves = [FisherEstimator((0.75,), 0.75, seed, 1.0).estimate(probe).format_curves for seed in range(12)]
    assert list(curves[0]) == ["model", "int8", "int4"]
    assert (curves[0]["model"][..., -1] == 0).all()
    for name, own in (("int8", INT8), ("int4", INT4)):
        found = torch.stack([x[name][..., -1] for x in curves]).mean(0).sum(-1)
        for layer in range(3):
            layers = LayerFormats(tuple(own if row == layer else None for row in range(3)))
            coded = TransformersProbe(model, ids, entry_format=layers)
            exact = float(coded.soft_loss(lambda _, rank: torch.zeros(3, *rank.shape[1:])))
            assert 0.4 < float(found[layer]) / exact < 2.5


def test_one_format_is_measured_where_entries_have_one():
    probe = TransformersProbe(sharp_model(), tiny_ids(64), entry_format=INT8)
    found = FisherEstimator((0.75,), 0.75, others=1).estimate(probe)
    assert found.format_curves is None and float(found.curves[..., -1].min()) > 0
    plain = FisherEstimator((0.75,), 0.75, others=1).estimate(TransformersProbe(sharp_model(), tiny_ids(64)))
    assert found.curve_capacities.tolist() == plain.curve_capacities.tolist()
    torch.testing.assert_close(found.curves[..., 0], plain.curves[..., 0], rtol=0.2, atol=1e-4)


def test_a_probe_that_knows_no_formats_is_named():
    with pytest.raises(PluginError, match="curves of the format int8 were asked for, and the probe knows nothing"):
        FisherEstimator().estimate(EveryFormat(SyntheticProbe(head_dim=16)))


def hidden_beyond(rank, kept):
    return torch.zeros(3, *rank.shape[1:]).masked_fill(rank >= kept, float("-inf"))


def divergence(probe, layer, head, capacity):
    def bias(at, rank):
        out = torch.zeros(3, *rank.shape[1:])
        if at == layer:
            out[head].masked_fill_(rank[0] >= capacity - probe.num_sink_tokens, float("-inf"))
        return out

    return float(probe.soft_loss(bias))


def test_importance_is_read_off_the_curves_and_hull_takes_them():
    found = FisherEstimator(sizes=(0.5, 0.125), size=0.125).estimate(SyntheticProbe())
    assert found.curve_capacities.tolist() == [8, 32, 64]
    assert torch.equal(found.per_head, found.curves[..., 0])
    budget = Budget(3 * 2 * 20, (3, 2), 5, 64)
    assert int(apportion(HullAllocator().shares(found, budget), budget).sum()) == 120


def test_its_cost_is_told():
    assert FisherEstimator().num_forwards(SyntheticProbe().spec, prompts=9, sequences=3) == 12


@pytest.mark.parametrize("others", [0.0, 1.5])
def test_others_that_are_no_part_are_refused(others):
    with pytest.raises(PluginError, match=r"fisher: others must be a part of the context in \(0, 1\]"):
        FisherEstimator(others=others)


@pytest.mark.parametrize("values", [{"sizes": ()}, {"sizes": (0.5, 1.0)}, {"sizes": (0.5,)}], ids=str)
def test_sizes_that_do_not_fit_are_refused(values):
    with pytest.raises(PluginError, match="fisher: sizes must be parts of the context"):
        FisherEstimator(**values)
