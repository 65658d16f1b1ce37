"""The memory estimate, held against real caches' bytes, hand-made sums and DynamicCache's own tensors."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from kvpolicy_kernels.formats import INT4, INT8, EntryFormat
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.cache_utils import DynamicCache

from kvpolicy import estimate, new_cache
from kvpolicy.budget.memory_size import read_size
from kvpolicy.errors import BudgetError
from kvpolicy.integrations.transformers import activations_of
from kvpolicy.measure.memory import estimate_memory
from kvpolicy.model.layer_spec import LayerSpec
from kvpolicy.model.spec import ModelSpec
from kvpolicy.verbs.estimate import Limits
from tests.tiny import over, tiny_ids, tiny_model

FULL = LayerSpec("full", 4, 2, 16, 8)
SLIDING = LayerSpec("sliding", 4, 2, 16, 8, window=32)
SHARED = LayerSpec("full", 4, 2, 16, 8, shared_with=0)
LINEAR = LayerSpec("linear", 4, 2, 16, 8)


def make_spec(*layers: LayerSpec) -> ModelSpec:
    return ModelSpec("mine", 64, 100, 4096, "{}", layers)


def test_every_part_by_hand() -> None:
    got = estimate_memory(make_spec(FULL, SLIDING, FULL, SHARED, LINEAR), 1000, 0.3, 5, 2, weights_bytes=1000)
    assert got.entries == 5 * 1200  # 0.3 of 1000 tokens in 2 layers of 2 KV heads
    assert got.kept_bytes == 6000 * (16 + 8) * 2
    assert got.dense_bytes == 5 * 4000 * 48
    assert got.layer_bytes == 5 * 2000 * 48
    assert got.other_bytes == 5 * 31 * 2 * 48  # a window of 32 without the token that comes
    # positions; 5 int64 of each sequence and KV head, 1 of each sequence, in 2 layers; 1 of each sequence; capacities
    assert got.table_bytes == 6000 * 4 + 2 * 5 * (2 * 5 + 1) * 8 + 5 * 8 + 4 * 8
    assert got.cache_bytes == got.kept_bytes + got.table_bytes + got.other_bytes
    assert got.prefill_peak_bytes == got.cache_bytes + got.layer_bytes
    assert got.dynamic_cache_bytes == got.dense_bytes + got.other_bytes
    assert (got.total_bytes, got.dynamic_total_bytes) == (got.cache_bytes + 1000, got.dynamic_cache_bytes + 1000)
    assert got.cache_ratio == got.cache_bytes / got.dynamic_cache_bytes


def test_a_window_holds_no_more_than_the_context() -> None:
    assert estimate_memory(make_spec(FULL, SLIDING), 10, 1.0, 1, 2).other_bytes == 10 * 2 * 48


def test_json_names_everything() -> None:
    shown = estimate_memory(make_spec(FULL), 1000, 0.5, 1, 2).to_json()
    assert shown["weights_bytes"] is None
    assert shown["total_bytes"] == shown["cache_bytes"] == 1000 * 48 + 1000 * 4 + 12 * 8 + 2 * 8


@pytest.mark.parametrize("policy", ["streaming", "snapkv"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("entry_format", [None, INT8, INT4], ids=["model", "int8", "int4"])
def test_cache_bytes_are_what_a_real_cache_holds(policy: str, batch: int, entry_format: EntryFormat | None) -> None:
    model = tiny_model("Llama")
    spec = ModelSpec.from_config(model.config)
    for context, retention, entries in [
        (40, 0.3, 40),  # below the least budget of 128: kept whole, with room for more
        (120, 0.3, 120),
        (300, 0.3, 128),  # 0.3 of 300 is 90
        (500, 0.3, 150),
        (501, 0.3, None),  # no whole number for each KV head
        (300, 1.0, 300),
    ]:
        cache = new_cache(model, retention=retention, policy=policy, format=entry_format)
        with torch.no_grad():
            model(tiny_ids(context, batch), **over(cache))
        weight = estimate_memory(spec, context, retention, batch, 4, policy=policy, entry_format=entry_format)
        assert weight.cache_bytes == cache.nbytes, (context, retention)
        assert weight.entries == int(cache.lengths.sum())
        assert entries is None or weight.entries == entries * cache.lengths.numel()


def test_a_score_is_counted_where_the_policy_has_one() -> None:
    with_scores, without = (estimate_memory(make_spec(FULL), 1000, 0.3, 5, 2, policy=p) for p in ("snapkv", None))
    assert with_scores.cache_bytes - without.cache_bytes == 4 * 3000
    assert with_scores.entries == without.entries == 3000


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
    weight = estimate_memory(spec, 40, 1.0, 3, 2)
    assert weight.dynamic_cache_bytes == held
    assert weight.kept_bytes == weight.dense_bytes


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"context_length": 0}, "context_length is 0"),
        ({"context_length": 2**31}, "context_length is 2147483648, but a sequence can have .* tokens at most"),
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


class Live(TorchDispatchMode):
    """The most bytes of new tensors that are alive at once."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.peak = known, 0
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = op(*args, **(kwargs or {}))
        for tensor in (each for each in tree_leaves(made) if isinstance(each, torch.Tensor)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.known:
                self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.live = {key: item for key, item in self.live.items() if not item[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return made


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Mistral"])
@pytest.mark.parametrize("sizes", [(96, 256), (192, 288)])
def test_activations_are_those_that_live_in_a_forward(name: str, sizes: tuple[int, int]) -> None:
    model = tiny_model(name, hidden_size=sizes[0], intermediate_size=sizes[1]).bfloat16()
    known = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    ids = tiny_ids(500, 2)
    with torch.no_grad(), Live(known) as live:
        model.model(ids, use_cache=False)
    assert 2 * 500 * activations_of(model.config, 2) == pytest.approx(live.peak, rel=0.05)


@pytest.fixture
def long_model(tmp_path: Path) -> Path:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 100}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 100_000}
    transformers.LlamaConfig(**sizes, **heads, pad_token_id=0, eos_token_id=1).save_pretrained(tmp_path)
    return tmp_path


def test_the_most_that_fits_is_the_last_that_does(long_model: Path) -> None:
    run: dict[str, Any] = {"retention": (0.5, 0.1), "gpu_memory": "4 MB", "policy": "snapkv"}
    answer = estimate(long_model, context=1000, batch=2, **run)
    assert answer.device_bytes == 4_000_000 and answer.limits is not None and answer.full_limits is not None
    assert answer.full_limits.context < answer.limits[0].context < answer.limits[1].context < answer.max_context
    for index, limits in enumerate(answer.limits):
        for more, fits in ((0, True), (1, False)):
            longer = estimate(long_model, context=limits.context + more, batch=2, **run)
            wider = estimate(long_model, context=1000, batch=limits.batch + more, **run)
            assert longer.fits(longer.rows[index]) is wider.fits(wider.rows[index]) is fits
    row = answer.rows[0]
    assert row.peak_bytes == (row.weights_bytes or 0) + row.prefill_peak_bytes + row.activation_bytes


def test_the_peak_is_that_of_an_h200_within_three_percent(tmp_path: Path) -> None:
    """The rows that `benchmarks/estimate_check.py` wrote there, the model's shape that of its `long_llama`."""
    transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, max_position_embeddings=262144, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)  # fmt: skip
    file = Path(__file__).parents[1] / "benchmarks" / "results" / "estimate_h200.csv"
    rows = list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))
    assert len(rows) == 6
    for row in rows:
        policy = "streaming" if row["policy"] == "full" else row["policy"]
        size = {"context": int(row["context"]), "batch": int(row["batch"]), "retention": float(row["kept"])}
        said = estimate(tmp_path, policy=policy, gpu_memory="1GB", **size).rows[0]
        peak = said.dynamic_peak_bytes if row["policy"] == "full" else said.peak_bytes
        assert peak is not None and abs(peak / 1e9 / float(row["measured_gigabytes"]) - 1) < 0.03


def test_what_the_model_was_made_for_ends_the_contexts(tiny_checkpoint: Path) -> None:
    answer = estimate(tiny_checkpoint, gpu_memory="10TB", retention=0.5)
    assert answer.limits is not None and answer.limits[0].context == answer.max_context > 0
    none = estimate(tiny_checkpoint, gpu_memory="10kB", retention=0.5)
    assert none.limits == (Limits(0, 0),)


@pytest.mark.parametrize(("text", "count"), [("24GB", 24 * 10**9), ("1.5 GiB", 3 * 2**29), (7, 7), ("9gb", 9 * 10**9)])
def test_sizes_are_read(text: str | int, count: int) -> None:
    assert read_size(text) == count


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "1e9", "24XB", "1 GB 2"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(BudgetError, match="is no size: expected"):
        read_size(text)
