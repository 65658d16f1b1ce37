"""The tiny models are what their configurations say, and stock transformers runs them: ground for the cache's tests."""

import sys
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import eager_mask

from kvpolicy import ModelError, ModelSpec
from tests.tiny import attention_of, over, tiny_ids, tiny_model
from tests.tiny_architectures import ARCHITECTURES, CROSSING, REFUSED, SHARED_KEYS, WITH_LINEAR

RECORDING = "tests_recording"


@dataclass
class Call:
    """What one layer's attention function got: query `[B, Hq, T, D]`, key, value `[B, H, T, D]`, mask `[T, T]`."""

    query: Tensor
    key: Tensor
    value: Tensor
    visible: Tensor


@pytest.fixture
def record():
    """Runs a model on tokens without a cache; returns the `Call` of each layer that has attention."""
    calls = {}

    def attention(module, query, key, value, mask, **options):
        calls[module.layer_idx] = Call(query, key, value, mask[0, 0] == 0)
        eager = sys.modules[type(module).__module__].eager_attention_forward
        return eager(module, query, key, value, mask, **options)

    AttentionInterface.register(RECORDING, attention)
    AttentionMaskInterface.register(RECORDING, eager_mask)

    @torch.no_grad()
    def run(model, ids):
        model.set_attn_implementation(RECORDING)
        model(ids, use_cache=False)
        return calls

    return run


def visible_tokens(kind, window, length):
    """bool `[T, T]`: what a query (row) may attend to."""
    query, key = torch.arange(length)[:, None], torch.arange(length)
    first = {
        "full": torch.zeros_like(query),
        "sliding": query - (window or 0) + 1,
        "chunked": query // (window or 1) * (window or 1),
    }[kind]
    return (first <= key) & (key <= query)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_spec_is_the_model(name, record):
    model = tiny_model(name, attention=attention_of(name))
    spec = ModelSpec.from_config(model.config)
    calls = record(model, tiny_ids(80))
    assert len(spec.layers) == model.config.get_text_config().num_hidden_layers
    assert [i for i, layer in enumerate(spec.layers) if layer.kind != "linear"] == sorted(calls)
    owners = {}
    for index, call in sorted(calls.items()):
        layer = spec.layers[index]
        assert call.query.shape == (1, layer.num_q_heads, 80, layer.key_dim)
        assert call.key.shape == (1, layer.num_kv_heads, 80, layer.key_dim)
        assert call.value.shape == (1, layer.num_kv_heads, 80, layer.value_dim)
        assert torch.equal(call.visible, visible_tokens(layer.kind, layer.window, 80))
        owner = owners.setdefault(id(call.key), index)
        assert layer.shared_with == (None if owner == index else owner)
    assert any(layer.shared_with is not None for layer in spec.layers) == (name in SHARED_KEYS)
    assert ("linear" in {layer.kind for layer in spec.layers}) == (name in [*WITH_LINEAR, *CROSSING])


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_a_stock_cache_gives_what_no_cache_gives(name):
    model = tiny_model(name, attention=attention_of(name))
    ids = tiny_ids(43, batch=2)
    expected = model(ids, use_cache=False).logits
    cache = DynamicCache(config=model.config)
    logits = [model(ids[:, :40], **over(cache)).logits]
    logits += [model(ids[:, t : t + 1], **over(cache)).logits for t in range(40, 43)]
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=0, atol=1e-4)
    plain = [index for index, layer in enumerate(cache.layers) if type(layer) is DynamicLayer and layer.is_initialized]
    assert plain == list(ModelSpec.from_config(model.config).budgeted_layers)
    shuffled = model(ids.flip(1), use_cache=False).logits
    assert float((shuffled - expected).abs().max()) > 0.1, "the logits must depend on the tokens"


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_cache_refuses_runs_in_transformers(name):
    model = tiny_model(name)
    with torch.no_grad():
        assert bool(torch.isfinite(model(tiny_ids(20)).logits).all())
    if name == "DeepseekV3":
        with pytest.raises(ModelError, match=r"latent attention \(MLA"):
            ModelSpec.from_config(model.config)
    else:
        model.set_attn_implementation("eager")  # Falcon has no attention function to exchange: it stays as it was
        assert model.config._attn_implementation == "sdpa"
