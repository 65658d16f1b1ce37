"""What a store refuses, and what it says."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from kvpolicy import BudgetError, EvictionPolicy, PluginError
from kvpolicy.cache import RaggedStore
from kvpolicy.cache.schedule import Fixed
from kvpolicy.cache.store import Scoring
from tests.cache.play import spec_of, store_of, tensors
from tests.cache.policies import Recent, ValueNorm


@dataclass(frozen=True, slots=True)
class Wrong(EvictionPolicy):
    requires: ClassVar[frozenset[str]] = frozenset({"values"})
    prompt: str = ""
    step: str = ""
    num_sink_tokens: int = 1

    def score_prompt(self, activations):
        return _spoiled(activations.values.norm(dim=-1), self.prompt)

    def score_step(self, step):
        return _spoiled(step.scores.clamp(max=9), self.step)


def _spoiled(scores, how):
    return {
        "": lambda: scores,
        "shape": lambda: scores[..., :-1],
        "dtype": lambda: scores.double(),
        "nan": lambda: torch.where(scores == scores.max(), torch.nan, scores),
    }[how]()


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("shape", r"returned torch.float32 of shape \(1, 2, 8\), expected float32 of shape \(1, 2, 9\)"),
        ("dtype", r"returned torch.float64 of shape \(1, 2, 9\), expected float32"),
        ("nan", "returned NaN: absent entries"),
    ],
)
def test_scores_of_a_prompt(how, error):
    with pytest.raises(PluginError, match=r"Wrong.score_prompt " + error):
        store_of(Wrong(how), [5, 6]).prefill(0, *tensors(9))


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("shape", r"returned torch.float32 of shape \(10,\), expected float32 of shape \(11,\)"),
        ("dtype", "returned torch.float64"),
        ("nan", "returned NaN"),
    ],
)
def test_scores_of_a_step(how, error):
    store = store_of(Wrong("", how), [5, 6])
    store.prefill(0, *tensors(9))
    with pytest.raises(PluginError, match=r"Wrong.score_step " + error):
        store.decode(0, *tensors(1))


def test_infinite_scores_are_scores():
    @dataclass(frozen=True, slots=True)
    class Infinite(Wrong):
        def score_prompt(self, activations):
            return torch.tensor([0, torch.inf, -torch.inf, 3, -0.0, 0.0, -2, torch.inf]).expand(1, 2, -1)

    store = store_of(Infinite(), [4, 6])
    store.prefill(0, *tensors(8))
    assert [sorted(p.tolist()) for p in store.positions(0)] == [[0, 1, 3, 7], [0, 1, 3, 4, 5, 7]]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"decode": "keep"}, "decode must be 'evict' or 'append', got 'keep'"),
        ({"protected": [(3, 3)]}, r"a protected span must be \(begin, end\) .* got \(3, 3\)"),
        ({"protected": [(-1, 3)]}, "a protected span"),
        ({"protected": [(0, 3, 5)]}, "a protected span"),
        ({"protected": (0, 3)}, "a protected span .* got 0"),
        ({"protected": [(0.0, 3.0)]}, "a protected span"),
        ({"heads": (1, 2)}, r"heads must be \(first, count\) of the model's 2 KV heads, got \(1, 2\)"),
        ({"heads": (0, 0)}, "heads must be"),
    ],
)
def test_options(options, error):
    with pytest.raises(BudgetError, match=error):
        store_of(Recent(), [5, 6], **options)


@pytest.mark.parametrize(
    ("table", "sinks", "error"),
    [
        ([[4, 9]], 4, "gives 4 entries to layer 0, KV head 0, expected at least 5"),
        ([[9, 0]], 0, "gives 0 entries to layer 0, KV head 1, expected at least 1"),
        ([[9, 9], [9, 9]], 4, r"the budget is for \(layers, KV heads\) = \(2, 2\), the model has \(1, 2\)"),
        ([[9]], 4, r"\(1, 1\), the model has \(1, 2\)"),
    ],
)
def test_tables_that_do_not_fit(table, sinks, error):
    with pytest.raises(BudgetError, match=error):
        RaggedStore(spec_of(), Fixed(torch.tensor(table)), Recent(sinks))


def spoiled(name, change, length=1):
    parts = dict(zip(("query", "key", "value"), tensors(length), strict=True))
    return parts | {name: change(parts[name])}


@pytest.mark.parametrize(
    ("name", "change", "error"),
    [
        (
            "key",
            lambda x: x[:, :1],
            r"holds 1 sequences of 2 KV heads: expected keys .* \(1, 2, .*, 8\) and .* got \(1, 1",
        ),
        ("key", lambda x: x.expand(2, -1, -1, -1), r"got \(2, 2, .*, 8\)"),
        ("key", lambda x: x[..., :7], r"got \(1, 2, .*, 7\)"),
        ("value", lambda x: x[..., :5], r"and \(1, 2, .*, 5\)"),
        ("key", lambda x: x.double(), "layer 0 of this store holds torch.float32 on cpu, got torch.float64 on cpu"),
        ("value", lambda x: x.bfloat16(), "got torch.bfloat16 on cpu"),
        ("key", lambda x: x.to("meta"), "got torch.float32 on meta"),
    ],
)
@pytest.mark.parametrize("how", ["prefill", "decode"])
def test_tokens_that_do_not_fit(name, change, error, how):
    store = store_of(ValueNorm(), [5, 6])
    store.prefill(0, *tensors(3))
    before = (store.seen.tolist(), store.lengths.tolist())
    with pytest.raises(BudgetError, match=error):
        getattr(store, how)(0, **spoiled(name, change, 4 if how == "prefill" else 1))
    assert (store.seen.tolist(), store.lengths.tolist()) == before


def test_append_is_for_one_token_where_none_is_pending():
    store = store_of(Recent(), [5, 6])
    query, key, value = tensors(2)
    error = r"append takes one token where tokens are held and none is pending, got {} for layer 0"
    with pytest.raises(BudgetError, match=error.format(1)):
        store.append(0, key[:, :, :1], value[:, :, :1])
    store.prefill(0, *tensors(3))
    with pytest.raises(BudgetError, match=error.format(2)):
        store.append(0, key, value)
    store.keep(0, query, store.arrive(0, key, value), Scoring(), hold=1)
    with pytest.raises(BudgetError, match=error.format(1)):
        store.append(0, key[:, :, :1], value[:, :, :1])
    assert store.seen.tolist() == [5]


def test_padding_of_another_shape():
    store, (query, key, value) = store_of(Recent(), [5, 6], batch_size=2), tensors(4, batch=2)
    with pytest.raises(BudgetError, match=r"num_padding must be \[2\], one for each row, got \[1\]"):
        store.prefill(0, query, key, value, num_padding=[3])
    with pytest.raises(BudgetError, match=r"valid=\[2, 4\] or None, got 4 and \[1, 4\]"):
        store.arrive(0, key, value, torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(BudgetError, match=r"at least one token .* got 0 and None"):
        store.prefill(0, query[:, :, :0], key[:, :, :0], value[:, :, :0])
    assert store.seen.tolist() == [0, 0]


def test_a_layer_that_holds_nothing_cannot_be_attended_to():
    store = store_of(Recent(), [[5, 6], [5, 6]])
    store.prefill(0, *tensors(3))
    with pytest.raises(BudgetError, match="layer 1 of this store is empty: its prompt comes first"):
        store.attend(1, tensors(1)[0], None)


def test_a_model_with_learned_sinks_needs_them():
    store = RaggedStore(spec_of(sinks=True), Fixed(torch.tensor([[5, 6]])), Recent())
    with pytest.raises(BudgetError, match=r"model type 'test' has learned sinks: give sink_logits \[num_q_heads\]"):
        store.prefill(0, *tensors(3))
    store.prefill(0, *tensors(3), sink_logits=torch.zeros(6))
    with pytest.raises(BudgetError, match="has learned sinks"):
        store.decode(0, *tensors(1))


@pytest.mark.parametrize("rows", [[2], [-1], []])
def test_rows_that_are_not_there(rows):
    store = store_of(Recent(), [5, 6], batch_size=2)
    store.prefill(0, *tensors(3, batch=2))
    with pytest.raises(BudgetError, match="take expects rows from 0 to 1, got"):
        store.take(torch.tensor(rows, dtype=torch.int64))
    assert store.batch_size == 2
