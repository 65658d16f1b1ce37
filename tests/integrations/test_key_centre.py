"""What the keys of a head have in common, which codes of few bits are not spent on."""

import contextlib
import json
from dataclasses import replace

import pytest
import torch
from accelerate import cpu_offload
from kvpolicy_kernels.formats import INT4, INT8
from kvpolicy_kernels.key_centre import CIRCLE, KeyCentre
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import DynamicCache

import kvpolicy
from kvpolicy import BudgetError, FormatWarning, KVPolicyError, ModelSpec, TransformersProbe
from kvpolicy.cache.schedule import Fixed
from kvpolicy.cache.store import RaggedStore
from kvpolicy.integrations.transformers.attention import key_centre, mean_key
from kvpolicy.integrations.transformers.attention.attention_modules import attention_modules
from kvpolicy.integrations.transformers.attention.rotary import find_rotary
from kvpolicy.integrations.transformers.cache.save import file_bytes
from kvpolicy.plugins.registry import registry
from tests.integrations.ragged_oracle import stepped_logits
from tests.tiny import attention_of, over, tiny_ids, tiny_model
from tests.tiny_architectures import ARCHITECTURES

REACH = 512


def biased(name="Qwen2", factor=200, **options):
    model = tiny_model(name, **options)
    for attention, _ in attention_modules(model, range(3)):
        attention.k_proj.bias.data.mul_(factor)
    return model


def off_centre(**options):
    """Keys have a large mean and no bias: all hidden states have much in common."""
    model = tiny_model("Llama", **options)
    model.model.embed_tokens.weight.data += 0.3 * torch.randn(48)
    return model


def spec_of(model):
    return ModelSpec.from_config(model.config)


def modules_of(model):
    return [attention for attention, _ in attention_modules(model, spec_of(model).budgeted_layers)]


@torch.no_grad()
def keys_before_rope(model):
    """Of each layer [H, n, D], of the sample's tokens from the eighth on, as the last module before RoPE gives them."""
    found, hooks = [], []
    for attention in modules_of(model):
        part = next(getattr(attention, x) for x in ("k_norm", "k_proj", "qkv_proj") if hasattr(attention, x))
        hooks.append(part.register_forward_hook(lambda *given: found.append(given[-1][0])))
    model(mean_key.sample_ids(model))
    for hook in hooks:
        hook.remove()
    heads = model.config.num_key_value_heads
    if hasattr(attention, "qkv_proj"):  # of queries, keys and values
        first = model.config.num_attention_heads * 16
        found = [keys[:, first : first + heads * 16] for keys in found]
    return [keys.reshape(-1, heads, 16).transpose(0, 1)[:, 8:] for keys in found]


def turned_means(model, count=REACH):
    """Of each layer [H, count, D], at the positions below `count`."""
    angles = torch.arange(count)[:, None] * model.model.rotary_emb.inv_freq
    cos, sin = torch.cat([angles.cos()] * 2, 1), torch.cat([angles.sin()] * 2, 1)
    for keys in keys_before_rope(model):
        mean = keys.mean(1, keepdim=True)
        yield mean * cos + torch.cat([-mean[..., 8:], mean[..., :8]], -1) * sin


def nothing_is_held(model):
    """Neither an attention of ours, nor a handler, nor another forward."""
    held = [x for module in model.modules() for x in vars(module) if x in ("_kvpolicy_handler", "forward")]
    return model.config._attn_implementation == "sdpa" and not held


MODELS = {
    "a mean and no bias": off_centre,
    "a large bias": biased,
    "a norm behind them": lambda: tiny_model("Qwen3"),
    "fused": lambda: tiny_model("Phi3"),
    "partly turned": lambda: tiny_model("Glm"),
    "neighbours": lambda: tiny_model("Cohere"),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_mean_is_that_of_keys_before_they_are_turned(name):
    model = MODELS[name]()
    find_rotary(model, modules_of(model))
    found = mean_key.mean_keys(model, modules_of(model))
    for own, keys in zip(found, keys_before_rope(model), strict=True):
        mean = keys.mean(1)
        torch.testing.assert_close(own.mean, mean, rtol=1e-4, atol=1e-4 * float(keys.abs().max()))
        away = (keys - mean[:, None]).square().sum((0, 2)).mean()
        assert own.spread == pytest.approx(float(away), rel=1e-3)


def test_the_sample_is_the_same_each_time_and_mostly_frequent_tokens():
    model = tiny_model("Llama")
    ids = mean_key.sample_ids(model)
    assert ids.shape == (1, 256) and torch.equal(ids, mean_key.sample_ids(model))
    assert ids.min() >= 48 and ids.max() < 97
    model.config.vocab_size = 49152
    ids = mean_key.sample_ids(model)
    assert ids.min() >= 256 and ids.max() < 49152
    assert (ids < 3547).float().mean() == pytest.approx(0.5, abs=0.1)  # the geometric mean of 256 and 49152


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_keys_of_any_architecture_lie_nearer_to_it_than_to_zero(monkeypatch, name):
    """As a cache is handed them. With a wave for each pair it is the turned mean itself."""
    monkeypatch.setattr(key_centre, "WORTH", 0.0)
    model = tiny_model(name, attention=attention_of(name))
    spec, cache, ids = spec_of(model), DynamicCache(config=model.config), mean_key.sample_ids(model)
    centres = key_centre.key_centres(model, spec)
    if name == "Gemma4":  # how it turns its keys is not known
        assert centres == [None] * spec.num_budgeted_layers
        return
    model(ids, **over(cache))
    for layer, centre in zip(spec.budgeted_layers, centres, strict=True):
        keys = cache.layers[layer].keys[0]
        rest = keys - centre.along(keys.shape[1])
        assert rest[:, 8:].square().sum() < keys[:, 8:].square().sum()


@torch.no_grad()
@pytest.mark.parametrize("waves", [0, 1, 3, 8])
def test_few_waves_come_nearest_to_the_turned_mean(monkeypatch, waves):
    """By least squares over the positions that the model was made for; all waves are the mean itself."""
    monkeypatch.setattr(key_centre, "WAVES", waves)
    monkeypatch.setattr(key_centre, "WORTH", 0.0)
    model = biased()
    frequencies = model.model.rotary_emb.inv_freq.double()
    angles = torch.arange(REACH)[:, None] * frequencies

    def left(heads, chosen):
        """The mean square that is left of each [N, D], under the best coefficients of these waves."""
        own = torch.cat([torch.ones(REACH, 1), angles[:, chosen].cos(), angles[:, chosen].sin()], 1).double()
        return (heads - own @ torch.linalg.lstsq(own, heads, driver="gelsd").solution).square().mean()

    found = key_centre.key_centres(model, spec_of(model))
    for centre, turned in zip(found, turned_means(model), strict=True):
        assert centre.coefficients.shape == (1 + 2 * waves, 2, 16) and turned.abs().max() > 5
        for head, own in enumerate(turned.double()):
            turns = centre.frequencies[head].double() * (2 * torch.pi / CIRCLE)
            chosen = (turns[:, None] - frequencies).abs().argmin(1).tolist()
            assert len({*chosen}) == waves
            rest = (centre.along(REACH)[head] - own).square().mean()
            assert rest < 1e-4 if waves == 8 else rest <= left(own, chosen) * 1.001 + 1e-4
            if 0 < waves < 8:  # the last one is the best beside the others
                assert left(own, chosen) <= min(left(own, [*chosen[:-1], i]) for i in range(8)) * 1.001 + 1e-4


@torch.no_grad()
def test_pairs_that_turn_slowly_are_followed_to_the_length_that_a_model_was_made_for(monkeypatch):
    """Their mean over the first 4096 positions lies far from them further on; few waves are enough for all of them."""
    monkeypatch.setattr(key_centre, "WAVES", 2)
    model = biased(rope_parameters={"rope_type": "default", "rope_theta": 1e7}, max_position_embeddings=32768)
    for attention in modules_of(model):
        slow = torch.arange(16).remainder(8).ge(4).repeat(2)
        attention.k_proj.bias.data *= slow
        attention.k_proj.weight.data *= slow[:, None]
    for centre, turned in zip(key_centre.key_centres(model, spec_of(model)), turned_means(model, 32768), strict=True):
        rest = (centre.along(32768) - turned).square().mean(-1)
        assert (rest < 1e-4 * turned.square().mean()).all()


@torch.no_grad()
def test_a_layer_has_waves_where_a_constant_leaves_too_much_of_its_keys(monkeypatch):
    """Of which their distance to their mean is left in any case."""
    model, shares = biased(factor=20), []
    monkeypatch.setattr(key_centre, "WAVES", 2)
    for worth in (0.0, float("inf")):
        monkeypatch.setattr(key_centre, "WORTH", worth)
        key_centre._CENTRES.clear()
        left = []
        for centre, turned, keys in zip(
            key_centre.key_centres(model, spec_of(model)), turned_means(model), keys_before_rope(model), strict=True
        ):
            assert centre.frequencies.shape[1] == (0 if worth else 2)
            spread = (keys - keys.mean(1, keepdim=True)).square().sum((0, 2)).mean()
            left.append(spread + (turned - centre.along(REACH)).square().sum((0, 2)).mean())
        shares.append(torch.stack(left))
    worth = shares[1] / shares[0]
    assert worth.min() > 1.1
    for layer, own in enumerate(worth.tolist()):
        for factor, waves in ((0.99, 2), (1.01, 0)):
            monkeypatch.setattr(key_centre, "WORTH", own * factor)
            key_centre._CENTRES.clear()
            assert key_centre.key_centres(model, spec_of(model))[layer].frequencies.shape[1] == waves


def test_a_constant_is_enough_but_for_a_large_bias():
    for model, waves in ((tiny_model("Llama"), 0), (tiny_model("Qwen3"), 0), (biased(), 8)):
        assert [x.frequencies.shape for x in key_centre.key_centres(model, spec_of(model))] == [(2, waves)] * 3


@torch.no_grad()
@pytest.mark.parametrize("seen_before", [True, False])
def test_it_is_the_same_where_weights_are_elsewhere(seen_before):
    model, spec = biased(), spec_of(biased())
    expected = key_centre.key_centres(model if seen_before else biased(), spec)
    offloaded = cpu_offload(model, execution_device=torch.device("cpu"))
    assert offloaded.model.layers[0].self_attn.k_proj.bias.is_meta
    for found, own in zip(key_centre.key_centres(offloaded, spec), expected, strict=True):
        assert torch.equal(found.coefficients, own.coefficients) and torch.equal(found.frequencies, own.frequencies)
    cache = kvpolicy.new_cache(offloaded, retention=0.5, min_tokens=8, format="int4")
    assert stepped_logits(offloaded, tiny_ids(90), cache, [80, *[1] * 10]).isfinite().all()


def turned_unknown(model):
    model.model.rotary_emb.rename = model.model.rotary_emb.inv_freq
    del model.model.rotary_emb.inv_freq


def fused_and_turned_unknown(model):
    turned_unknown(model)
    for attention in modules_of(model):
        attention.qkv_proj = attention.k_proj
        del attention.k_proj


@pytest.mark.parametrize("change", [turned_unknown, fused_and_turned_unknown])
def test_a_bias_whose_turn_is_not_known_is_told_once(change):
    """Keys are encoded whole then, which under int4 may lose most of the quality."""
    model = tiny_model("Qwen2")
    change(model)
    why = "Qwen2Attention has no rotary embedding that kvpolicy recognises"
    with pytest.warns(
        FormatWarning, match=rf"^Qwen2ForCausalLM: keys have a bias that cannot be taken off .* \({why}.*use format"
    ):
        kvpolicy.new_cache(model, retention=0.5, min_tokens=8, format="int4")
    assert key_centre.key_centres(model, spec_of(model)) == [None] * 3
    for own in ("int4", "int8"):
        kvpolicy.new_cache(model, retention=0.5, min_tokens=8, format=own)  # a warning is an error here


def test_nothing_is_told_where_keys_have_no_bias():
    model = tiny_model("Llama")
    turned_unknown(model)
    kvpolicy.new_cache(model, retention=0.5, min_tokens=8, format="int4")
    assert key_centre.key_centres(model, spec_of(model)) == [None] * 3


@pytest.mark.parametrize("entry_format", [INT4, INT8], ids=str)
@pytest.mark.parametrize("name", ["Qwen2", "Llama"])
def test_codes_are_not_spent_on_what_keys_have_in_common(name, entry_format):
    """A bias in channels that turn slowly, as Qwen2.5's is, or a mean without any bias; values' codes lose the rest."""
    options = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e12}}
    model, ids = tiny_model(name, **options) if name == "Qwen2" else off_centre(**options), tiny_ids(120)
    slow = torch.arange(16) % 8 >= 4
    for attention in modules_of(model):
        if name == "Llama":
            attention.k_proj.weight.data.mul_(20)
        else:
            attention.k_proj.bias.data.view(2, 16).add_(50 * slow * torch.randn(2, 16).sign())

    def logits(own):
        return stepped_logits(model, ids, kvpolicy.new_cache(model, retention=1.0, format=own), [80, 40])[:, 80:]

    whole = logits(None)
    centred, plain = ((whole - logits(replace(entry_format, centred=x))).abs().mean() for x in (True, False))
    assert plain > (5 if name == "Qwen2" else 1.4) * centred


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


def saved(tmp_path, model):
    cache, path = kvpolicy.new_cache(model, retention=0.5, min_tokens=8, format="int4"), tmp_path / "cache.kv"
    stepped_logits(model, tiny_ids(80), cache, [80])
    cache.save(path)
    return cache, path


def test_a_file_says_what_its_keys_were_encoded_less_of(tmp_path, monkeypatch):
    """Whoever reads it may work out another centre."""
    model, other = biased(), biased()
    cache, path = saved(tmp_path, model)
    monkeypatch.setattr(key_centre, "WAVES", 1)
    parts = [
        stepped_logits(own, tiny_ids(10), x, [10])
        for own, x in ((model, cache), (other, kvpolicy.load_cache(other, path)))
    ]
    torch.testing.assert_close(*parts, rtol=0, atol=1e-5)


@pytest.fixture
def forwards(monkeypatch):
    """The models whose mean was taken, in order."""
    own, seen = key_centre.mean_keys, []

    def counted(model, attentions):
        seen.append(model)
        return own(model, attentions)

    monkeypatch.setattr(key_centre, "mean_keys", counted)
    return seen


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_caches_of_a_model_share_its_centres(forwards, name):
    """Until weights of its attention are others."""
    model, spec = biased(), spec_of(biased())
    first, second = (key_centre.key_centres(model, spec) for _ in range(2))
    kvpolicy.new_cache(model, retention=0.5, format="int4")
    assert all(a is b for a, b in zip(first, second, strict=True)) and forwards == [model]
    with torch.no_grad():
        getattr(model.model.layers[2].self_attn.k_proj, name).mul_(2)
    third = key_centre.key_centres(model, spec)
    assert forwards == [model] * 2
    for layer, (own, other) in enumerate(zip(first, third, strict=True)):
        assert torch.equal(own.coefficients, other.coefficients) == (layer < 2)


def test_a_format_without_a_centre_runs_nothing(forwards):
    model = biased()
    for own in (None, replace(INT4, centred=False)):
        stepped_logits(model, tiny_ids(20), kvpolicy.new_cache(model, retention=0.5, min_tokens=8, format=own), [20])
    assert not forwards


@pytest.mark.parametrize("born", [True, False])
def test_it_outlives_inference_mode(born):
    """What is made there is used under gradients later. born: the weights are made there, too"""
    model, spec = biased(), spec_of(biased())
    with torch.inference_mode():
        if born:
            model = biased()
        inside = key_centre.key_centres(model, spec)
    assert all(a is b for a, b in zip(inside, key_centre.key_centres(model, spec), strict=True))
    for own, expected in zip(inside, key_centre.key_centres(biased(), spec), strict=True):
        assert not own.coefficients.is_inference() and not own.frequencies.is_inference()
        assert torch.equal(own.coefficients, expected.coefficients)
    if not born:
        probe, size = TransformersProbe(model, tiny_ids(60), entry_format=INT4), torch.zeros((), requires_grad=True)
        probe.soft_loss(lambda layer, rank: (size * rank).expand(2, *rank.shape[1:]), sequence=0).sum().backward()
        assert size.grad.isfinite() and size.grad != 0


def test_generate_under_an_attached_model_has_it(forwards):
    """The cache is made in the middle of it."""
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    ask, ids, found = {"retention": 0.6, "min_tokens": 8, "format": "int4"}, tiny_ids(60), []
    for model in (off_centre(), off_centre()):
        if not found:
            with kvpolicy.attached(model, **ask):
                out = model.generate(ids, **options)
            assert nothing_is_held(model)
        else:
            out = model.generate(ids, **over(kvpolicy.new_cache(model, **ask)), **options)
        assert out.past_key_values.store.key_centres.count(None) == 0
        found.append(torch.stack(out.logits, 1))
    assert len(forwards) == 2
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)


@pytest.mark.parametrize("fails", [True, False])
def test_a_model_is_left_as_it_was(monkeypatch, fails):
    model, before = off_centre(), torch.get_rng_state()
    if fails:
        monkeypatch.setattr(model.lm_head, "weight", None)
        with pytest.raises(TypeError):
            key_centre.key_centres(model, spec_of(model))
    else:
        key_centre.key_centres(model, spec_of(model))
    assert nothing_is_held(model) and torch.equal(torch.get_rng_state(), before)
    kvpolicy.new_cache(model, retention=0.5, min_tokens=8)  # attaches it
    name = model.config._attn_implementation
    model.model.layers[0].self_attn.k_proj.weight.data.mul_(2)
    with contextlib.suppress(TypeError):
        key_centre.key_centres(model, spec_of(model))
    assert model.config._attn_implementation == name != "sdpa"
    assert not any(hasattr(module, "_kvpolicy_handler") for module in model.modules())


def test_a_file_without_a_centre_is_refused(tmp_path):
    """As those of before, whose keys were encoded less another one."""
    _, path = saved(tmp_path, biased(factor=1))
    tensors = {name: x for name, x in load_file(path).items() if "key_centre" not in name}
    with safe_open(path, "pt") as file:
        document = json.loads(file.metadata()["kvpolicy"])
    document.pop("crc32")
    path.write_bytes(file_bytes(document, tensors))
    with pytest.raises(KVPolicyError, match=r"'layers.0.key_centre' is missing, as in files of before .* read the"):
        kvpolicy.load_cache(biased(factor=1), path)


def test_centres_that_do_not_fit_are_refused():
    spec = ModelSpec.from_config(tiny_model("Llama").config)
    policy = registry.create("policy", "streaming")
    right, other = (KeyCentre(torch.zeros(3, 2, dim), torch.zeros(2, 1, dtype=torch.int32)) for dim in (16, 8))
    for centres in ([right] * 2, [other, None, None]):
        with pytest.raises(
            BudgetError, match=r"key_centres must be one of shape \(2, 16\) or None for each of 3 layers"
        ):
            RaggedStore(spec, Fixed(torch.full((3, 2), 50)), policy, entry_format=INT4, key_centres=centres)
