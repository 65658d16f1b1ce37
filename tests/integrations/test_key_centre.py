"""What the keys of a head have in common, which codes of few bits are not spent on."""

import json
from dataclasses import replace

import pytest
import torch
from accelerate import cpu_offload
from kvpolicy_kernels.formats import INT4, INT8
from kvpolicy_kernels.key_centre import CIRCLE, KeyCentre
from safetensors import safe_open
from safetensors.torch import load_file

import kvpolicy
from kvpolicy import BudgetError, FormatWarning, KVPolicyError, ModelSpec
from kvpolicy.cache.schedule import Fixed
from kvpolicy.cache.store import RaggedStore
from kvpolicy.integrations.transformers.attention import key_centre
from kvpolicy.integrations.transformers.attention.attention_modules import attention_modules
from kvpolicy.integrations.transformers.cache.save import file_bytes
from kvpolicy.plugins.registry import registry
from tests.integrations.ragged_oracle import stepped_logits
from tests.tiny import tiny_ids, tiny_model


def biased(name="Qwen2", factor=200, **options):
    model = tiny_model(name, **options)
    for attention, _ in attention_modules(model, range(3)):
        attention.k_proj.bias.data.mul_(factor)
    return model


def turned_biases(model, count):
    """Of each layer [H, count, D], at the positions below `count`."""
    angles = torch.arange(count)[:, None] * model.model.rotary_emb.inv_freq
    cos, sin = torch.cat([angles.cos()] * 2, 1), torch.cat([angles.sin()] * 2, 1)
    for attention, _ in attention_modules(model, range(3)):
        bias = attention.k_proj.bias.view(2, 1, 16)
        yield bias * cos + torch.cat([-bias[..., 8:], bias[..., :8]], -1) * sin


@torch.no_grad()
@pytest.mark.parametrize("waves", [0, 1, 3, 8])
def test_few_waves_come_nearest_to_the_turned_bias(monkeypatch, waves):
    """By least squares over the positions that the model was made for; all waves are the bias itself."""
    monkeypatch.setattr(key_centre, "WAVES", waves)
    model = biased()
    length, frequencies = model.config.max_position_embeddings, model.model.rotary_emb.inv_freq.double()
    angles = torch.arange(length)[:, None] * frequencies

    def left(heads, chosen):
        """The mean square that is left of each [N, D], under the best coefficients of these waves."""
        own = torch.cat([torch.ones(length, 1), angles[:, chosen].cos(), angles[:, chosen].sin()], 1).double()
        return (heads - own @ torch.linalg.lstsq(own, heads, driver="gelsd").solution).square().mean()

    found = key_centre.key_centres(model, ModelSpec.from_config(model.config))
    for centre, turned in zip(found, turned_biases(model, length), strict=True):
        assert centre.coefficients.shape == (1 + 2 * waves, 2, 16) and turned.abs().max() > 5
        for head, own in enumerate(turned.double()):
            turns = centre.frequencies[head].double() * (2 * torch.pi / CIRCLE)
            chosen = (turns[:, None] - frequencies).abs().argmin(1).tolist()
            assert len({*chosen}) == waves
            rest = (centre.along(length)[head] - own).square().mean()
            assert rest < 1e-4 if waves == 8 else rest <= left(own, chosen) * 1.001 + 1e-4
            if 0 < waves < 8:  # the last one is the best beside the others
                assert left(own, chosen) <= min(left(own, [*chosen[:-1], i]) for i in range(8)) * 1.001 + 1e-4


@torch.no_grad()
def test_pairs_that_turn_slowly_are_followed_to_the_length_that_a_model_was_made_for(monkeypatch):
    """Their mean over the first 4096 positions lies far from them further on; few waves are enough for all of them."""
    monkeypatch.setattr(key_centre, "WAVES", 2)
    model = biased(rope_parameters={"rope_type": "default", "rope_theta": 1e7}, max_position_embeddings=32768)
    for attention, _ in attention_modules(model, range(3)):
        attention.k_proj.bias.data *= torch.arange(16).remainder(8).ge(4).repeat(2)
    for centre, turned in zip(
        key_centre.key_centres(model, ModelSpec.from_config(model.config)), turned_biases(model, 32768), strict=True
    ):
        rest = (centre.along(32768) - turned).square().mean(-1)
        assert (rest < 1e-4 * turned.square().mean()).all()


@torch.no_grad()
def test_it_is_the_same_where_weights_are_elsewhere():
    model, spec = biased(), ModelSpec.from_config(biased().config)
    expected = key_centre.key_centres(model, spec)
    offloaded = cpu_offload(model, execution_device=torch.device("cpu"))
    assert offloaded.model.layers[0].self_attn.k_proj.bias.is_meta
    for found, own in zip(key_centre.key_centres(offloaded, spec), expected, strict=True):
        assert torch.equal(found.coefficients, own.coefficients) and torch.equal(found.frequencies, own.frequencies)
    cache = kvpolicy.new_cache(offloaded, retention=0.5, min_tokens=8, format="int4")
    assert stepped_logits(offloaded, tiny_ids(90), cache, [80, *[1] * 10]).isfinite().all()


@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
def test_keys_without_a_bias_have_none(name):
    """Or with a norm behind it."""
    model = tiny_model(name)
    assert key_centre.key_centres(model, ModelSpec.from_config(model.config)) == [None] * 3


def moved_to_meta(model):
    for attention, _ in attention_modules(model, range(3)):
        attention.k_proj.to("meta")


def turned_unknown(model):
    model.model.rotary_emb.rename = model.model.rotary_emb.inv_freq
    del model.model.rotary_emb.inv_freq


def fused(model):
    for attention, _ in attention_modules(model, range(3)):
        attention.qkv_proj = attention.k_proj
        del attention.k_proj


def partly_here(model):
    """As under ZeRO-3, which leaves empty tensors."""
    for attention, _ in attention_modules(model, range(3)):
        attention.k_proj.bias.data = torch.empty(0)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (moved_to_meta, "it is on the meta device"),
        (turned_unknown, "Qwen2Attention has no rotary embedding that kvpolicy recognises"),
        (fused, "it is a part of Qwen2Attention.qkv_proj's"),
        (partly_here, "it has 0 numbers"),
    ],
)
def test_a_bias_that_is_not_known_is_told_once(change, why):
    """Keys are encoded whole then, which under int4 may lose most of the quality."""
    model = tiny_model("Qwen2")
    change(model)
    with pytest.warns(
        FormatWarning, match=rf"^Qwen2ForCausalLM: keys have a bias that cannot be taken off .* \({why}.*use format"
    ):
        kvpolicy.new_cache(model, retention=0.5, min_tokens=8, format="int4")
    assert key_centre.key_centres(model, ModelSpec.from_config(model.config)) == [None] * 3
    for own in ("int4", "int8"):
        kvpolicy.new_cache(model, retention=0.5, min_tokens=8, format=own)  # a warning is an error here


@pytest.mark.parametrize("change", [turned_unknown, moved_to_meta])
def test_nothing_is_told_where_keys_have_no_bias(change):
    model = tiny_model("Llama")
    change(model)
    kvpolicy.new_cache(model, retention=0.5, min_tokens=8, format="int4")


@pytest.mark.parametrize("entry_format", [INT4, INT8], ids=str)
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


def test_caches_of_a_model_share_its_centres():
    """Until its bias is another."""
    model, spec = biased(), ModelSpec.from_config(biased().config)
    first, second = (key_centre.key_centres(model, spec) for _ in range(2))
    assert all(a is b for a, b in zip(first, second, strict=True))
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.bias.mul_(2)
    third = key_centre.key_centres(model, spec)
    assert [a is b for a, b in zip(first, third, strict=True)] == [True, False, True]


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
