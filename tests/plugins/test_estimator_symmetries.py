"""What each estimator sees of a model: renamed KV heads, and heads whose output goes nowhere."""

import copy

import pytest
import torch
from kvpolicy_baklava.estimator import CosineEstimator
from kvpolicy_baselines.entropy import EntropyEstimator
from kvpolicy_baselines.fisher import FisherEstimator
from kvpolicy_baselines.layer_cosine import LayerCosineEstimator
from kvpolicy_baselines.retrieval import RetrievalEstimator
from kvpolicy_baselines.sensitivity import SensitivityEstimator
from kvpolicy_baselines.shuffled import ShuffledEstimator
from kvpolicy_baselines.uniform import UniformEstimator

from kvpolicy import TransformersProbe, registry
from tests.plugins.test_retrieval import characters
from tests.tiny import tiny_ids, tiny_model

LAYERS, KV_HEADS, DIM = 3, 3, 16
ORDERS = torch.tensor([[1, 2, 0], [2, 0, 1], [0, 2, 1]])  # of the KV heads, another one in each layer
# what a KV head is worth, in the layer where its output is dropped: as before, or this
SEEN = {
    "uniform": (UniformEstimator(), None),
    "cosine": (CosineEstimator(), None),
    "cosine max": (CosineEstimator(group="max"), None),
    "cosine proj": (CosineEstimator(head_input="proj"), 1.0),
    "cosine proj_residual": (CosineEstimator(head_input="proj_residual"), 0.0),
    "entropy": (EntropyEstimator(observation_window=8), None),
    "retrieval": (RetrievalEstimator(depths=2), None),
}
ESTIMATORS = {name: estimator for name, (estimator, _) in SEEN.items()} | {
    "layer_cosine": LayerCosineEstimator(),
    "sensitivity": SensitivityEstimator(),
    "fisher": FisherEstimator(),
}


def sharp_model(group=2):
    """Its KV heads differ: attention of the plain tiny model is nearly even."""
    model = tiny_model("Llama", group=group, num_kv_heads=KV_HEADS, layers=LAYERS)
    with torch.no_grad():
        for head, factor in enumerate((2.0, 4.0, 8.0)):
            for layer, block in enumerate(model.model.layers):
                block.self_attn.q_proj.weight.unflatten(0, (KV_HEADS, -1))[(head + layer) % KV_HEADS] *= factor
    return model


def measured(estimator, model):
    prompts = [tiny_ids(length)[0] for length in (60, 110)]
    return estimator.estimate(TransformersProbe(model, tiny_ids(64), prompts, tokenize=characters))


def permuted(model, orders=ORDERS):
    """The same function with its KV heads, and the query heads of each, in another order."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for block, order in zip(model.model.layers, orders, strict=True):
            for name in ("q_proj", "k_proj", "v_proj"):
                weight = getattr(block.self_attn, name).weight
                weight.copy_(weight.unflatten(0, (KV_HEADS, -1))[order].flatten(0, 1))
            weight = block.self_attn.o_proj.weight
            weight.copy_(weight.unflatten(1, (KV_HEADS, -1))[:, order].flatten(1, 2))
    return model


def without(model, layer, heads):
    """The columns of the output projection that belong to these KV heads are zero."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.model.layers[layer].self_attn.o_proj.weight.unflatten(1, (KV_HEADS, -1))[:, heads] = 0
    return model


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-5)


def moved(found, before):
    return ~torch.isclose(found, before, rtol=2e-3, atol=2e-4)


def test_every_estimator_of_the_built_in_sets_is_here():
    built_in = {x.name for x in registry.rows() if x.role == "estimator" and x.distribution == "kvpolicy"}
    assert {name.split()[0] for name in ESTIMATORS} | {"shuffled"} == built_in


# --- renamed KV heads


def test_the_permuted_model_is_the_same_function():
    model, ids = sharp_model(), tiny_ids(60)
    with torch.no_grad():
        assert_same(permuted(model)(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_values_go_with_their_kv_heads(name):
    model, estimator = sharp_model(), ESTIMATORS[name]
    before, after = measured(estimator, model), measured(estimator, permuted(model))
    assert_same(after.per_head, before.per_head.gather(1, ORDERS))
    assert (after.per_layer is None) == (before.per_layer is None)
    if before.per_layer is not None:
        assert_same(after.per_layer, before.per_layer)
    if before.curves is not None:
        assert_same(after.curves, before.curves.gather(1, ORDERS[..., None].expand_as(before.curves)))
    by_layer = name in ("uniform", "layer_cosine")
    assert bool(moved(after.per_head, before.per_head).any()) != by_layer, "or there is nothing to see"


def test_slice_depends_on_the_order_of_the_heads():
    """It compares a head with the part of the hidden state that has its number."""
    model, estimator, order = sharp_model(group=1), CosineEstimator(head_input="slice"), torch.tensor([1, 2, 0])
    before = measured(estimator, model).per_head
    renamed = permuted(model, order.expand(LAYERS, -1))
    assert bool(moved(measured(estimator, renamed).per_head, before[:, order]).any())
    # where the parts of the hidden state are put into that order too, values go with their heads
    places = (order[:, None] * DIM + torch.arange(DIM)).flatten()
    with torch.no_grad():
        for parameter_name, parameter in renamed.named_parameters():
            writes = parameter_name.endswith(("o_proj.weight", "down_proj.weight", "norm.weight"))
            parameter.copy_(parameter[places] if writes else parameter[:, places])
    assert_same(measured(estimator, renamed).per_head, before[:, order])


def test_shuffled_values_do_not_go_with_their_heads():
    model = sharp_model()
    before, after = measured(ShuffledEstimator(), model), measured(ShuffledEstimator(), permuted(model))
    assert_same(after.per_head.flatten().sort().values, before.per_head.flatten().sort().values)
    assert_same(after.per_layer, before.per_layer)
    assert bool(moved(after.per_head, before.per_head.gather(1, ORDERS)).any())


# --- heads whose output is dropped


@pytest.mark.parametrize("layer", [0, LAYERS - 1])
@pytest.mark.parametrize("name", SEEN)
def test_a_dropped_head_in_its_own_layer_and_after(name, layer):
    (estimator, worth), model = SEEN[name], sharp_model()
    before, after = measured(estimator, model), measured(estimator, without(model, layer, [1]))
    expected = before.per_head[: layer + 1].clone()
    if worth is not None:
        assert moved(expected[layer, 1], torch.tensor(worth))
        expected[layer, 1] = worth
    assert_same(after.per_head[: layer + 1], expected)
    later = moved(after.per_head[layer + 1 :], before.per_head[layer + 1 :])
    assert bool(later.any()) == (layer == 0 and name != "uniform"), "through the residual stream"


@pytest.mark.parametrize("layer", [0, LAYERS - 1])
@pytest.mark.parametrize("name", ["cosine", "cosine proj", "layer_cosine"])
def test_layer_importance_sees_what_is_dropped(name, layer):
    model, estimator = sharp_model(), ESTIMATORS[name]
    before, after, nothing = (
        measured(estimator, changed).per_layer
        for changed in (model, without(model, layer, [1]), without(model, layer, [0, 1, 2]))
    )
    assert_same(after[:layer], before[:layer])
    assert bool(moved(after, before)[layer:].all())
    assert float(nothing[layer]) == pytest.approx(0, abs=1e-6), "attention that adds nothing turns nothing"


def test_layer_cosine_does_not_tell_the_heads_of_a_layer_apart():
    found = measured(LayerCosineEstimator(), without(sharp_model(), 1, [1]))
    assert torch.equal(found.per_head, found.per_layer[:, None].expand(-1, KV_HEADS))


@pytest.mark.parametrize(("layer", "head"), [(0, 2), (1, 0), (LAYERS - 1, 2)])
def test_sensitivity_of_a_dropped_head_is_zero_at_every_size(layer, head):
    """Of the others, in front of it too, the values change: the loss is another one."""
    before = measured(SensitivityEstimator(), sharp_model())
    found = measured(SensitivityEstimator(), without(sharp_model(), layer, [head]))
    assert before.per_head[layer, head] > 1e-3, "or there is nothing to see"
    assert float(found.per_head[layer, head]) == pytest.approx(0, abs=2e-6)
    full = found.curves[layer, head, -1].expand(4)
    torch.testing.assert_close(found.curves[layer, head], full, rtol=0, atol=2e-6)
    others = [i for i in range(LAYERS) if i != layer]
    assert bool(moved(found.curves[others], before.curves[others]).any(-1).all())


def test_slice_sees_a_dropped_head_in_later_layers_alone():
    model, estimator = sharp_model(group=1), CosineEstimator(head_input="slice")
    before, after = measured(estimator, model).per_head, measured(estimator, without(model, 1, [1])).per_head
    assert_same(after[:2], before[:2])
    assert bool(moved(after[2], before[2]).any())


def test_shuffled_sees_what_its_estimator_sees_and_not_where():
    model = without(sharp_model(), LAYERS - 1, [1])
    found = measured(ShuffledEstimator(estimator_params={"head_input": "proj_residual"}), model).per_head
    known = measured(CosineEstimator(head_input="proj_residual"), model).per_head
    assert torch.equal(found.flatten().sort().values, known.flatten().sort().values)
    assert known.argmin() == LAYERS * KV_HEADS - 2 != found.argmin()
