"""ModelSpec from real transformers configurations, and the value objects' own checks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from kvpolicy.errors import BudgetError, ModelError
from kvpolicy.model.layer_spec import LayerSpec
from kvpolicy.model.spec import Budget, Importance, ModelSpec

SMALL = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 128}
GQA = {**SMALL, "num_key_value_heads": 2}


def spec_of(name: str, **settings: Any) -> ModelSpec:
    return ModelSpec.from_config(getattr(transformers, name)(**settings))


def kinds(spec: ModelSpec) -> list[str]:
    return [layer.kind for layer in spec.layers]


@pytest.mark.parametrize("name", ["LlamaConfig", "Qwen2Config", "Phi3Config", "GPT2Config"])
def test_plain_models_are_full_in_every_layer(name: str) -> None:
    settings = SMALL if name == "GPT2Config" else {**GQA, "pad_token_id": 0}
    spec = spec_of(name, **settings)
    kv_heads = 4 if name == "GPT2Config" else 2
    assert spec.table_shape == (4, kv_heads)
    assert spec.layers[0] == LayerSpec("full", 4, kv_heads, 16, 16)
    assert (spec.hidden_size, spec.vocab_size, spec.group_size) == (64, 128, 4 // kv_heads)


def test_head_dim_of_its_own() -> None:
    assert spec_of("Qwen3Config", **GQA, head_dim=128).head_dim == 128
    assert spec_of("LlamaConfig", **GQA, head_dim=32).entry_bytes(2) == 128


def test_sliding_models_without_layer_types() -> None:
    with pytest.raises(ModelError, match="no full-attention layer to budget \\(layers: sliding\\)"):
        spec_of("MistralConfig", **GQA, sliding_window=16)
    with pytest.raises(ModelError, match="sliding"):
        spec_of("Phi3Config", **GQA, sliding_window=16, pad_token_id=0)
    assert kinds(spec_of("MistralConfig", **GQA, sliding_window=None)) == ["full"] * 4


def test_a_window_as_long_as_the_context_is_no_window() -> None:
    """Long Phi-3 and Phi-4-mini: sliding_window 262144, context 131072."""
    for window in (64, 65):
        spec = spec_of("Phi3Config", **GQA, sliding_window=window, max_position_embeddings=64, pad_token_id=0)
        assert kinds(spec) == ["full"] * 4
        assert spec.attention.window is None
    with pytest.raises(ModelError, match="sliding"):
        spec_of("Phi3Config", **GQA, sliding_window=63, max_position_embeddings=64, pad_token_id=0)
    listed = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 64}
    raw = SimpleNamespace(**GQA, model_type="mine", max_position_embeddings=64, **listed)
    assert kinds(ModelSpec.from_config(raw)) == ["full"] * 4


def test_gpt_neo_alternates() -> None:
    spec = spec_of(
        "GPTNeoConfig", hidden_size=64, num_layers=4, num_heads=4, attention_types=[[["global", "local"], 2]]
    )
    assert kinds(spec) == ["full", "sliding"] * 2
    assert spec.layers[1].window == 256


def test_cross_attention_is_not_budgeted() -> None:
    spec = spec_of("MllamaConfig", text_config={**GQA, "cross_attention_layers": [1], "pad_token_id": 0})
    assert kinds(spec) == ["full", "linear", "full", "full"]
    assert spec.budgeted_layers == (0, 2, 3)


def test_qwen2_uses_its_window_only_when_told() -> None:
    assert kinds(spec_of("Qwen2Config", **GQA, sliding_window=16)) == ["full"] * 4
    spec = spec_of("Qwen2Config", **GQA, sliding_window=16, use_sliding_window=True, max_window_layers=3)
    assert kinds(spec) == ["full", "full", "full", "sliding"]
    assert spec.layers[3].window == 16
    raw = SimpleNamespace(**GQA, model_type="qwen2", sliding_window=16, use_sliding_window=False)
    assert kinds(ModelSpec.from_config(raw)) == ["full"] * 4


def test_gemma2_softcap_and_alternation() -> None:
    spec = spec_of("Gemma2Config", **GQA, head_dim=32, sliding_window=16)
    assert kinds(spec) == ["sliding", "full", "sliding", "full"]
    assert spec.budgeted_layers == (1, 3)
    assert spec.attention.softcap == 50.0
    assert spec.head_dim == 32


def test_gemma3_composite_is_read_at_its_text_part() -> None:
    text = {**GQA, "num_hidden_layers": 6, "head_dim": 16, "sliding_window": 8}
    alone = spec_of("Gemma3TextConfig", **text)
    assert kinds(alone) == ["sliding"] * 5 + ["full"]
    assert alone.attention.softcap is None
    assert spec_of("Gemma3Config", text_config=text) == alone


def test_gemma3n_shares_keys_and_values() -> None:
    pattern = ["sliding_attention", "full_attention"] * 3
    spec = spec_of(
        "Gemma3nTextConfig",
        **{**GQA, "num_hidden_layers": 6},
        head_dim=16,
        layer_types=pattern,
        num_kv_shared_layers=3,
        intermediate_size=32,
    )
    assert [layer.shared_with for layer in spec.layers] == [None, None, None, 1, 2, 1]
    assert spec.budgeted_layers == (1,)


def test_gemma4_global_layers_have_their_own_heads() -> None:
    if not hasattr(transformers, "Gemma4TextConfig"):
        pytest.skip("this transformers has no Gemma 4")
    spec = spec_of(
        "Gemma4TextConfig",
        **{**SMALL, "num_hidden_layers": 6, "num_key_value_heads": 4},
        head_dim=16,
        global_head_dim=32,
        num_global_key_value_heads=2,
        attention_k_eq_v=True,
    )
    assert (spec.layers[0].num_kv_heads, spec.layers[0].key_dim) == (4, 16)
    assert (spec.num_kv_heads, spec.head_dim) == (2, 32)


def test_gpt_oss_sinks() -> None:
    spec = spec_of("GptOssConfig", **GQA, head_dim=16)
    assert kinds(spec) == ["sliding", "full"] * 2
    assert all(layer.sinks for layer in spec.layers)
    assert spec.layers[0].window == 128
    assert not spec_of("LlamaConfig", **GQA).attention.sinks


def test_llama4_chunks() -> None:
    spec = spec_of("Llama4TextConfig", **GQA, head_dim=16, attention_chunk_size=32)
    assert kinds(spec) == ["chunked"] * 3 + ["full"]
    assert spec.layers[0].window == 32


def test_qwen3_next_linear_layers() -> None:
    spec = spec_of("Qwen3NextConfig", **GQA, head_dim=16)
    assert kinds(spec) == ["linear"] * 3 + ["full"]
    assert spec.table_shape == (1, 2)


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("DeepseekV3Config", {}, "latent attention .MLA"),
        ("T5Config", {}, "encoder-decoder"),
        ("BartConfig", {}, "encoder-decoder"),
        ("BertConfig", {}, "an encoder .is_decoder = False"),
        ("RobertaConfig", {}, "an encoder .is_decoder = False"),
        ("DistilBertConfig", {}, "keeps no cache .its configuration has no use_cache"),
        ("ModernBertConfig", {}, "keeps no cache .its configuration has no use_cache"),
        ("MambaConfig", {}, "no attention heads"),
        ("FalconH1Config", {}, "'hybrid', which kvpolicy does not know"),
        ("Gemma3TextConfig", {"use_bidirectional_attention": True}, "both directions"),
    ],
)
def test_refused_with_the_reason(name: str, settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        spec_of(name, **settings)


def test_decoders_that_say_nothing_of_it_are_taken() -> None:
    assert kinds(spec_of("GPTNeoXConfig", **SMALL)) == ["full"] * 4  # is_decoder = False there
    assert kinds(spec_of("BertConfig", **SMALL, is_decoder=True)) == ["full"] * 4


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"hidden_size": None}, "hidden_size = None"),
        ({"vocab_size": "many"}, "vocab_size = 'many'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0"),
        ({"layer_types": ["full_attention"]}, "1 layer types for 4 layers"),
        ({"layer_types": ["full_attention"] * 3 + ["sliding_attention"]}, "sliding_window is not set"),
        ({"num_key_value_heads": 3}, "do not divide"),
        ({"num_kv_shared_layers": 4}, "no layer before 0"),
    ],
)
def test_contradictions_in_a_configuration(changed: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        ModelSpec.from_config(SimpleNamespace(**{**GQA, "model_type": "mine", **changed}))


def test_plain_objects_are_enough() -> None:
    inner = {**GQA, "model_type": "mine", "rope_theta": 5e5}
    spec = ModelSpec.from_config(SimpleNamespace(model_type="outer", text_config=inner))
    assert (spec.model_type, spec.rope, spec.max_context) == ("mine", '{"rope_theta": 500000.0}', 0)


def test_config_sha256_follows_rope_and_sizes() -> None:
    base = spec_of("LlamaConfig", **GQA)
    assert base.config_sha256 == spec_of("LlamaConfig", **GQA).config_sha256
    others = [
        spec_of("LlamaConfig", **{**GQA, "vocab_size": 129}),
        spec_of("LlamaConfig", **GQA, rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
        spec_of("Qwen3Config", **GQA, head_dim=16),
    ]
    assert len({spec.config_sha256 for spec in [base, *others]}) == 4


def test_differing_budgeted_layers_are_refused() -> None:
    layers = (LayerSpec("full", 4, 2, 16, 16), LayerSpec("full", 4, 4, 16, 16))
    with pytest.raises(ModelError, match="differ in"):
        ModelSpec("mine", 64, 128, 0, "{}", layers)


def test_total_entries() -> None:
    assert spec_of("LlamaConfig", **GQA).total_entries(0.3, 1000) == 2400


@pytest.mark.parametrize(
    "settings",
    [
        {"floor": torch.zeros(1, 2, dtype=torch.int64)},
        {"cost": torch.ones(3, 3, dtype=torch.int64)},
        {"floor": 5, "ceiling": 4},
        {"floor": -1},
        {"total": -1},
    ],
)
def test_budget_refuses(settings: dict[str, Any]) -> None:
    with pytest.raises(BudgetError):
        Budget(**{"total": 10, "shape": (2, 2), "floor": 0, "ceiling": 9, **settings})


@pytest.mark.parametrize(
    ("per_head", "per_layer"),
    [
        (torch.ones(4), None),
        (torch.ones(2, 2), torch.ones(3)),
        (torch.tensor([[1.0, float("nan")]]), None),
        (torch.ones(1, 2), torch.tensor([-1.0])),
    ],
)
def test_importance_refuses(per_head: torch.Tensor, per_layer: torch.Tensor | None) -> None:
    with pytest.raises(BudgetError):
        Importance(per_head, per_layer)
