import math

import pytest
import torch
from kvpolicy_baselines.layer_cosine import LayerCosineEstimator

from kvpolicy import PluginError, TransformersProbe
from kvpolicy.testing import check_estimator
from tests.tiny import tiny_ids, tiny_model


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)


def by_hand(model, prompts):
    """1 - cosine, token by token, from the model's own hidden states and attention outputs."""
    changes = [[] for _ in model.model.layers]
    for prompt in prompts:
        attended = {}
        handles = [
            block.self_attn.register_forward_hook(lambda m, a, r, i=i, kept=attended: kept.__setitem__(i, r[0][0]))
            for i, block in enumerate(model.model.layers)
        ]
        with torch.no_grad():
            hidden = model(prompt[None], output_hidden_states=True).hidden_states
        for handle in handles:
            handle.remove()
        for layer, of_layer in enumerate(changes):
            before = hidden[layer][0].double()
            after = (before + attended[layer]).tolist()
            tokens = [cosine(a, b) for a, b in zip(before.tolist(), after, strict=True)]
            of_layer.append(1 - sum(tokens) / len(tokens))
    return [sum(of_layer) / len(of_layer) for of_layer in changes]


def test_laws():
    check_estimator(LayerCosineEstimator)


@pytest.mark.parametrize("lengths", [(23,), (8, 30)])
def test_equals_a_direct_computation(lengths):
    model = tiny_model("Llama")
    prompts = [tiny_ids(n)[0] for n in lengths]
    found = LayerCosineEstimator().estimate(TransformersProbe(model, tiny_ids(64), prompts))
    expected = by_hand(model, prompts)
    assert found.per_layer.tolist() == pytest.approx(expected, abs=2e-6)
    assert found.per_head.tolist() == [[value] * 2 for value in found.per_layer.tolist()]
    assert max(expected) > 1.5 * min(expected), "layers must differ for this to say anything"


def test_a_probe_without_prompts_is_refused():
    with pytest.raises(PluginError, match="layer_cosine: the probe ran no prompt"):
        LayerCosineEstimator().estimate(TransformersProbe(tiny_model("Llama"), tiny_ids(64)))
