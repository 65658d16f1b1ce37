"""The memory estimate, held against hand-made sums and against DynamicCache's own tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers.cache_utils import DynamicCache

from kvpolicy.errors import BudgetError
from kvpolicy.estimate import estimate_memory
from kvpolicy.spec import LayerSpec, ModelSpec

FULL = LayerSpec("full", 4, 2, 16, 8)
SLIDING = LayerSpec("sliding", 4, 2, 16, 8, window=32)
SHARED = LayerSpec("full", 4, 2, 16, 8, shared_with=0)
LINEAR = LayerSpec("linear", 4, 2, 16, 8)


def make_spec(*layers: LayerSpec) -> ModelSpec:
    return ModelSpec("mine", 64, 100, 4096, "{}", layers)


def test_every_part_by_hand() -> None:
    got = estimate_memory(make_spec(FULL, SLIDING, FULL, SHARED, LINEAR), 100, 0.3, 5, 2, weights_bytes=1000)
    assert got.entries == 5 * 120  # 0.3 of 100 tokens in 2 layers of 2 KV heads
    assert got.kept_bytes == 600 * (16 + 8) * 2
    assert got.dense_bytes == 5 * 400 * 48
    assert got.layer_bytes == 5 * 200 * 48
    assert got.other_bytes == 5 * 32 * 2 * 48
    assert got.table_bytes == 600 * 4 + 5 * 4 * 16
    assert got.cache_bytes == got.kept_bytes + got.table_bytes + got.other_bytes
    assert got.prefill_peak_bytes == got.cache_bytes + got.layer_bytes
    assert got.dynamic_cache_bytes == got.dense_bytes + got.other_bytes
    assert (got.total_bytes, got.dynamic_total_bytes) == (got.cache_bytes + 1000, got.dynamic_cache_bytes + 1000)
    assert got.cache_ratio == got.cache_bytes / got.dynamic_cache_bytes


def test_a_window_holds_no_more_than_the_context() -> None:
    assert estimate_memory(make_spec(FULL, SLIDING), 10, 1.0, 1, 2).other_bytes == 10 * 2 * 48


def test_json_names_everything() -> None:
    shown = estimate_memory(make_spec(FULL), 100, 0.5, 1, 2).to_json()
    assert shown["weights_bytes"] is None
    assert shown["total_bytes"] == shown["cache_bytes"] == 100 * 48 + 100 * 4 + 2 * 16


@pytest.mark.parametrize(
    ("name", "more"),
    [("LlamaConfig", {}), ("GptOssConfig", {"head_dim": 16, "sliding_window": 9}), ("Qwen3Config", {"head_dim": 32})],
)
def test_dense_bytes_are_dynamic_caches(name: str, more: dict[str, Any]) -> None:
    config = getattr(transformers, name)(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, vocab_size=128, **more
    )
    spec = ModelSpec.from_config(config)
    cache = DynamicCache(config=config)
    for index, layer in enumerate(spec.layers):
        key = torch.zeros(3, layer.num_kv_heads, 40, layer.key_dim, dtype=torch.bfloat16)
        cache.update(key, key.clone(), index)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    estimate = estimate_memory(spec, 40, 1.0, 3, 2)
    slack = sum(3 * 2 * layer.num_kv_heads * layer.key_dim * 2 for layer in spec.layers if layer.kind == "sliding")
    assert 0 <= estimate.dynamic_cache_bytes - held <= slack  # a stock sliding layer holds window - 1 between steps
    assert estimate.kept_bytes == estimate.dense_bytes


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"context_length": 0}, "context_length is 0"),
        ({"context_length": 1.5}, "context_length is 1.5"),
        ({"batch_size": True}, "batch_size is True"),
        ({"itemsize": -2}, "itemsize is -2"),
        ({"retention": 0.0}, "retention is 0.0"),
        ({"retention": 30}, "retention is 30, .*0.3 keeps 30 %"),
        ({"retention": float("nan")}, "retention is nan"),
        ({"weights_bytes": -1}, "weights_bytes is -1"),
    ],
)
def test_refused(changed: dict[str, Any], message: str) -> None:
    settings = {"context_length": 10, "retention": 0.5, "batch_size": 1, "itemsize": 2, **changed}
    with pytest.raises(BudgetError, match=message):
        estimate_memory(make_spec(FULL), **settings)
