"""DiffLlama attends twice to the keys that it caches once: refused, never half kept."""

import pytest
import torch

import kvpolicy
from kvpolicy import ModelError
from tests.tiny import over, tiny_ids, tiny_model


@pytest.mark.parametrize("options", [{}, {"context_length": 64}])
def test_a_layer_that_attends_twice_is_refused(options):
    model = tiny_model("DiffLlama", num_kv_heads=2, group=2)
    cache = kvpolicy.new_cache(model, retention=1.0, **options)
    with torch.no_grad(), pytest.raises(ModelError, match=r"layer 0: DiffLlama.* attends several times to keys"):
        model(tiny_ids(20), **over(cache))


def test_so_is_one_whose_keys_others_share():
    """Its second call is its own, no follower's."""
    model = tiny_model("Gemma3n")
    cache = kvpolicy.new_cache(model, retention=1.0)
    layer = next(each for each in cache.budgeted if each.followers)
    attention = model.get_submodule(f"model.layers.{layer.model_layer}.self_attn")
    with pytest.raises(ModelError, match=f"layer {layer.model_layer}: .* attends several times"):
        layer.check_follower(attention)
    layer.check_follower(model.get_submodule("model.layers.5.self_attn"))
