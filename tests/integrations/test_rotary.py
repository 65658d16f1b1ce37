"""What a policy is told of RoPE, against the keys that the model itself turns."""

import pytest
import torch
from transformers import DynamicCache

import kvpolicy
from kvpolicy import LayerActivations, ModelError, ModelSpec, TransformersProbe
from kvpolicy.integrations.transformers.attention.attention_modules import attention_modules
from kvpolicy.integrations.transformers.attention.rotary import find_rotary, rotary_of
from tests.tiny import attention_of, over, tiny_ids, tiny_model

HALVES = ["Llama", "Qwen2", "Qwen3", "Phi3", "Granite", "Olmo2", "Gemma3", "Gemma2Window", "GptOss", "Gemma3n", "Llava"]
NEIGHBOURS = ["Cohere", "Ernie4_5", "Glm"]
NONE = ["Cohere2", "Llama4"]
SCALED = {
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 128},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "dynamic": {"factor": 2.0},
}


def keys_and_rotary(name, token=7, length=40, **options):
    """Of each budgeted layer, after a prompt of one token again and again: keys [H, n, D] and what was found.

    Every position attends over equal values, so that all layers see the same states everywhere, and keys differ by
    their turn alone. A learned sink makes that true of the first layer only.
    """
    model = tiny_model(name, attention=attention_of(name), **options)
    spec, cache = ModelSpec.from_config(model.config), DynamicCache(config=model.config)
    modules = [attention for attention, _ in attention_modules(model, spec.budgeted_layers)]
    find_rotary(model, modules)
    with torch.no_grad():
        model(torch.full((1, length), token), **over(cache))
    found = [(cache.layers[i].keys[0], rotary_of(m)) for i, m in zip(spec.budgeted_layers, modules, strict=True)]
    return found[:1] if spec.attention.sinks else found


def assert_turns_like_the_model(keys, rotary):
    angles = torch.arange(keys.shape[1])[:, None] * rotary.frequencies
    first = keys[:, :1].expand_as(keys)
    torch.testing.assert_close(rotary.turned(first, angles.cos(), angles.sin()), keys, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", HALVES + NEIGHBOURS)
def test_keys_are_turned_as_the_model_turns_them(name):
    for keys, rotary in keys_and_rotary(name):
        assert_turns_like_the_model(keys, rotary)
        assert not torch.allclose(keys[:, 0], keys[:, 1]), "there is something to turn"
        assert int(rotary.second[0]) == (1 if name in NEIGHBOURS else len(rotary.first))


def test_some_dimensions_may_be_left_alone():
    for keys, rotary in keys_and_rotary("Glm"):
        assert len(rotary.first) == keys.shape[-1] // 4
        assert torch.allclose(keys[:, 0, keys.shape[-1] // 2 :], keys[:, 9, keys.shape[-1] // 2 :])


@pytest.mark.parametrize("name", NONE)
def test_layers_that_turn_nothing(name):
    model = tiny_model(name)
    modules = [a for a, _ in attention_modules(model, ModelSpec.from_config(model.config).budgeted_layers)]
    find_rotary(model, modules)
    for module in modules:
        rotary = rotary_of(module)
        assert len(rotary.first) == len(rotary.second) == len(rotary.frequencies) == 0


@pytest.mark.parametrize("kind", SCALED)
def test_scaled_rope(kind):
    scaled = {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **SCALED[kind]}, "max_position_embeddings": 128}
    plain = keys_and_rotary("Llama")[0][1].frequencies
    for keys, rotary in keys_and_rotary("Llama", length=200, **scaled):
        assert_turns_like_the_model(keys, rotary)
        assert not torch.allclose(rotary.frequencies, plain), "frequencies are those of the scaled embedding"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype):
    model = tiny_model("Llama").to(dtype)
    modules = [attention for attention, _ in attention_modules(model, range(3))]
    find_rotary(model, modules)
    assert rotary_of(modules[0]).second.tolist() == list(range(8, 16))
    assert rotary_of(modules[0]).frequencies.dtype == torch.float32


def test_asking_leaves_the_model_as_it_was():
    model, ids = tiny_model("Llama"), tiny_ids(20)
    before = model(ids).logits
    find_rotary(model, [attention for attention, _ in attention_modules(model, range(3))])
    assert torch.equal(model(ids).logits, before)


def test_a_probe_and_a_cache_supply_it():
    model, seen = tiny_model("Granite"), []
    probe = TransformersProbe(model, tiny_ids(64), [tiny_ids(30)[0]])
    probe.observe(seen.append, frozenset({"rotary", "scale"}))
    for given in seen:
        assert isinstance(given, LayerActivations) and given.rotary.second[0] == 8
        assert given.scale == model.model.layers[given.layer].self_attn.scaling != 16**-0.5
    cache = kvpolicy.new_cache(model, policy="expected_attention", retention=0.4, min_tokens=8)
    with torch.no_grad():
        model(tiny_ids(50), **over(cache))
    assert int(cache.lengths.sum()) == round(0.4 * 50 * 6)


def test_a_rotation_that_is_not_understood_is_refused_before_any_work():
    model = tiny_model("Gemma4")
    with pytest.raises(ModelError, match=r"Gemma4TextAttention cannot be asked how it turns its keys.*use others"):
        kvpolicy.new_cache(model, policy="expected_attention", retention=0.5)
    model = tiny_model("Llama")
    del model.model.rotary_emb.inv_freq
    with pytest.raises(ModelError, match="LlamaAttention has no rotary embedding that kvpolicy recognises"):
        kvpolicy.new_cache(model, policy="expected_attention", retention=0.5)
    model = tiny_model("Llama")
    model.model.rotary_emb.mrope_section = [2, 3, 3]
    with pytest.raises(ModelError, match="LlamaAttention turns by several positions for each token"):
        kvpolicy.new_cache(model, policy="expected_attention", retention=0.5)


def test_an_unknown_order_of_pairs_is_refused(monkeypatch):
    from transformers.models.llama import modeling_llama

    stock = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, c, s: stock(q, k, c, -s))
    with pytest.raises(ModelError, match="LlamaAttention pairs dimensions in an order that kvpolicy does not know"):
        kvpolicy.new_cache(tiny_model("Llama"), policy="expected_attention", retention=0.5)
