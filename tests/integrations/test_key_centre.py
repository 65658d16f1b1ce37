"""What the keys of a head have in common, which codes of few bits are not spent on."""

from dataclasses import replace

import pytest
import torch
from accelerate import cpu_offload
from kvpolicy_kernels.formats import INT4, EntryFormat

import kvpolicy
from kvpolicy import BudgetError, ModelSpec
from kvpolicy.cache.schedule import Fixed
from kvpolicy.cache.store import RaggedStore
from kvpolicy.integrations.transformers.attention import key_centre
from kvpolicy.integrations.transformers.attention.attention_modules import attention_modules
from kvpolicy.plugins.registry import registry
from tests.integrations.ragged_oracle import stepped_logits
from tests.tiny import tiny_ids, tiny_model


def biased(name="Qwen2", factor=200):
    model = tiny_model(name)
    for attention, _ in attention_modules(model, range(3)):
        attention.k_proj.bias.data.mul_(factor)
    return model


@torch.no_grad()
def test_it_is_the_mean_of_the_turned_bias(monkeypatch):
    monkeypatch.setattr(key_centre, "POSITIONS", 500)
    model = biased()
    spec = ModelSpec.from_config(model.config)
    angles = torch.arange(500)[:, None] * model.model.rotary_emb.inv_freq
    cos, sin = torch.cat([angles.cos()] * 2, 1), torch.cat([angles.sin()] * 2, 1)
    for (attention, _), found in zip(
        attention_modules(model, range(3)), key_centre.key_centres(model, spec), strict=True
    ):
        bias = attention.k_proj.bias.view(2, 1, 16)
        turned = bias * cos + torch.cat([-bias[..., 8:], bias[..., :8]], -1) * sin
        torch.testing.assert_close(found, turned.mean(1), rtol=0, atol=1e-3)
        assert found.abs().max() > 5


@torch.no_grad()
def test_it_is_the_same_where_weights_are_elsewhere():
    model, spec = biased(), ModelSpec.from_config(biased().config)
    expected = key_centre.key_centres(model, spec)
    offloaded = cpu_offload(model, execution_device=torch.device("cpu"))
    assert offloaded.model.layers[0].self_attn.k_proj.bias.is_meta
    for found, own in zip(key_centre.key_centres(offloaded, spec), expected, strict=True):
        assert torch.equal(found, own)
    cache = kvpolicy.new_cache(offloaded, retention=0.5, min_tokens=8, format="int4")
    assert stepped_logits(offloaded, tiny_ids(90), cache, [80, *[1] * 10]).isfinite().all()


@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
def test_keys_without_a_bias_have_none(name):
    """Or with a norm behind it."""
    model = tiny_model(name)
    assert key_centre.key_centres(model, ModelSpec.from_config(model.config)) == [None] * 3


@pytest.mark.parametrize("entry_format", [INT4, EntryFormat(8)], ids=str)
def test_codes_are_not_spent_on_a_bias(entry_format):
    """Where it lies in channels that turn slowly, as Qwen2.5's does."""
    model, ids = tiny_model("Qwen2", rope_parameters={"rope_type": "default", "rope_theta": 1e12}), tiny_ids(120)
    for attention, _ in attention_modules(model, range(3)):
        slow = torch.arange(16) % 8 >= 4
        attention.k_proj.bias.data.view(2, 16).add_(50 * slow * torch.randn(2, 16).sign())

    def logits(own):
        return stepped_logits(model, ids, kvpolicy.new_cache(model, retention=1.0, format=own), [80, 40])[:, 80:]

    whole = logits(None)
    centred, plain = ((whole - logits(replace(entry_format, centred=x))).abs().mean() for x in (True, False))
    assert plain > 5 * centred


def test_a_file_from_before_keys_had_a_centre_is_read_as_it_was_written(tmp_path):
    model, path = biased(), tmp_path / "cache.kv"
    own = replace(INT4, centred=False)
    cache = kvpolicy.new_cache(model, retention=0.5, format=own)
    stepped_logits(model, tiny_ids(80), cache, [80])
    cache.save(path)
    loaded = kvpolicy.load_cache(model, path)
    assert loaded.recipe.entry_format == own
    parts = [stepped_logits(model, tiny_ids(10), x, [10]) for x in (cache, loaded)]
    torch.testing.assert_close(*parts, rtol=0, atol=1e-5)


def test_centres_that_do_not_fit_are_refused():
    spec = ModelSpec.from_config(tiny_model("Llama").config)
    policy = registry.create("policy", "streaming")
    for centres in ([torch.zeros(2, 16)] * 2, [torch.zeros(2, 8), None, None]):
        with pytest.raises(
            BudgetError, match=r"key_centres must be one of shape \[2, 16\] or None for each of 3 layers"
        ):
            RaggedStore(spec, Fixed(torch.full((3, 2), 50)), policy, entry_format=INT4, key_centres=centres)
