"""What a store refuses, and what it says."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from kvpolicy import BudgetError, BudgetPlan, EvictionPolicy, PluginError
from kvpolicy.cache import RaggedStore
from kvpolicy.cache.chunk import Chunk
from kvpolicy.cache.lower import lower
from kvpolicy.cache.schedule import Fixed
from kvpolicy.cache.store import Scoring
from tests.cache.play import spec_of, store_of, tensors
from tests.cache.policies import HeavyHitter, Recent, ValueNorm
from tests.cache.snapshot import snapshot


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
        ("nan", "returned NaN in layer 0: absent entries"),
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
        ("nan", "returned NaN in layer 0: absent entries"),
    ],
)
def test_scores_of_a_step(how, error):
    store = store_of(Wrong("", how), [5, 6])
    store.prefill(0, *tensors(9))
    with pytest.raises(PluginError, match=r"Wrong.score_step " + error):
        store.decode(0, *tensors(1))


@dataclass(frozen=True, slots=True)
class LateWrong(HeavyHitter):
    """NaN from some layer on."""

    first: int = 1

    def score_step(self, step):
        return step.scores * (torch.nan if step.layer >= self.first else 1.0)


@pytest.mark.parametrize(("first", "where"), [(1, "layer 1 and 1 more"), (2, "layer 2")])
def test_nan_names_the_layer(first, where):
    store = store_of(LateWrong(first=first), [[5, 6]] * 3)
    for layer in range(3):
        store.prefill(layer, *tensors(9))
    for layer in range(2):
        store.decode(layer, *tensors(1))
    with pytest.raises(PluginError, match=f"LateWrong.score_step returned NaN in {where}: absent"):
        store.decode(2, *tensors(1))


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
        ({"batch_size": 0}, "batch_size is 0, expected a whole number of at least 1"),
        ({"batch_size": 1.5}, "batch_size is 1.5"),
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


@pytest.mark.parametrize("table", [torch.tensor([[9.0, 9.0]]), torch.tensor([9, 9]), torch.ones(1, 2).bool()])
def test_what_is_no_table(table):
    with pytest.raises(BudgetError, match=r"capacities must be whole numbers \[layers, KV heads\], got torch\."):
        Fixed(table)


@pytest.mark.parametrize(
    ("table", "error"), [([[3, 3]], "gives 3 entries to layer 0"), ([[9, 9]] * 2, r"has shape \(2, 2\), the model")]
)
def test_capacities_that_cannot_be_lowered_to(table, error):
    store = store_of(ValueNorm(3), [9, 9])
    store.prefill(0, *tensors(9))
    with pytest.raises(BudgetError, match=error):
        lower(store, torch.tensor(table))
    assert store.lengths.tolist() == [[[9, 9]]]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"dtype": torch.int8}, "dtype is torch.int8, expected a floating-point dtype"),
        ({"device": "meta"}, "device is 'meta', which holds no entries"),
        ({"device": "nowhere"}, "device is 'nowhere', which is not here"),
    ],
)
def test_a_place_that_entries_cannot_lie_at(options, error):
    plan = BudgetPlan.from_capacities(spec_of(), [[9, 9]], 16)
    with pytest.raises(BudgetError, match=error):
        RaggedStore.from_plan(plan, spec=spec_of(), **options)


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
        ("key", lambda x: x.double(), "queries are torch.float32 on cpu, the keys are torch.float64 on cpu"),
        ("value", lambda x: x.bfloat16(), "got torch.bfloat16 on cpu"),
        ("key", lambda x: x.to("meta"), "queries are torch.float32 on cpu, the keys are torch.float32 on meta"),
        ("key", lambda x: x[0], r"got \(2, .*, 8\) and \(1, 2, .*, 6\)"),
        ("key", lambda x: x.int(), "keys are torch.int32, expected a floating-point dtype"),
        ("value", lambda x: x.tolist(), "values must be a tensor, got list"),
        ("query", lambda x: x[:, :4], r"expected queries of shape \(1, 6, ., 8\), got \(1, 4, ., 8\)"),
        ("query", lambda x: x.expand(2, -1, -1, -1), r"expected queries .* got \(2, 6, ., 8\)"),
        ("query", lambda x: x[..., :7], r"expected queries .* got \(1, 6, ., 7\)"),
        ("query", lambda x: x[:, :, :0], r"expected queries .* got \(1, 6, 0, 8\)"),
        ("query", lambda x: x[0], r"expected queries .* got \(6, ., 8\)"),
        ("query", lambda x: x.half(), "queries are torch.float16 on cpu, the keys are torch.float32 on cpu"),
        ("query", lambda x: None, "queries must be a tensor, got NoneType"),
        ("key", lambda x: spoilt(x, torch.nan), "layer 0: keys hold NaN or infinite numbers"),
        ("value", lambda x: spoilt(x, torch.inf), "layer 0: values hold NaN or infinite numbers"),
        ("query", lambda x: spoilt(x, torch.nan), "layer 0: queries hold NaN or infinite numbers"),
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


def spoilt(x, number):
    x = x.clone()
    x[0, 0, 0, 1] = number
    return x


def test_the_first_tokens_decide_on_the_dtype_only_once_they_fit():
    store, (query, key, value) = store_of(Recent(), [5, 6]), tensors(4)
    for wrong in ((query, key.double(), value), (query, key.double(), value.double())):
        with pytest.raises(BudgetError, match=r"queries are torch.float32"):
            store.prefill(0, *wrong)
    store.prefill(0, query, key, value)
    with pytest.raises(BudgetError, match=r"this store holds torch.float32 on cpu, got torch.float64 on cpu"):
        store.prefill(0, query.double(), key.double(), value.double())
    with pytest.raises(BudgetError, match=r"this store holds torch.float32 on cpu, got torch.float64 on cpu"):
        store.decode(0, *(x[:, :, :1].double() for x in (query, key, value)))
    assert store.seen.tolist() == [4]


def test_numbers_so_large_that_their_sum_is_not_finite():
    store, (query, key, value) = store_of(Recent(), [5, 6]), (x.half() for x in tensors(4))
    with pytest.raises(BudgetError, match="keys hold NaN"):
        store.prefill(0, query, spoilt(key, torch.inf), value)
    store.prefill(0, query, key, torch.full_like(value, 6e4))
    store.decode(0, query[:, :, :1], key[:, :, :1], torch.full_like(value, 6e4)[:, :, :1])
    assert store.seen.tolist() == [5]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_device_a_prompt_that_is_not_finite_is_told_in_its_last_layer():
    store, (query, key, value) = store_of(Recent(), [[9, 9]] * 2), (x.cuda() for x in tensors(4))
    store.prefill(0, query, key, spoilt(value, torch.nan))
    with pytest.raises(BudgetError, match="hold NaN or infinite numbers: this store is spoiled"):
        store.prefill(1, query, key, value)


def test_padding_is_of_numbers_too():
    store, (query, key, value) = store_of(Recent(), [9, 9]), tensors(4)
    with pytest.raises(BudgetError, match="layer 0: values hold NaN"):
        store.prefill(0, query, key, spoilt(value, torch.nan), num_padding=[2])
    assert store.seen.tolist() == [0]


@pytest.mark.parametrize("layer", [-1, 2, True, 0.0, "0", None], ids=repr)
def test_a_layer_that_is_not_there(layer):
    store, (query, key, value) = store_of(Recent(), [[5, 6], [5, 6]]), tensors(4)
    for index in range(2):
        store.prefill(index, query, key, value)
    one, scoring = [x[:, :, :1] for x in (query, key, value)], Scoring()
    chunk = Chunk(key, value, torch.arange(4)[None])
    calls = {
        "prefill": (query, key, value),
        "decode": one,
        "can_append": (),
        "positions": (),
        "append": one[1:],
        "attend": (query, scoring),
        "attend_newest": (one[0], scoring),
        "arrive": (key, value),
        "attend_chunk": (query, chunk, scoring),
        "keep": (query, chunk, scoring),
    }
    before = snapshot(store)
    for name, arguments in calls.items():
        with pytest.raises(BudgetError, match=r"layer is .*, expected a whole number from 0 to 1: the budgeted layers"):
            getattr(store, name)(layer, *arguments)
    assert snapshot(store) == before


def fed(*layers, count=3, batch=1):
    """A store of three layers of which these have seen a prompt."""
    store = store_of(Recent(), [[9, 9]] * 3, batch_size=batch)
    for layer in layers:
        store.prefill(layer, *tensors(count, batch))
    return store


@pytest.mark.parametrize(
    ("before", "layer", "count", "error"),
    [
        ((), 1, 3, r"layer 1 has seen \[0\] tokens .* is handed \[3\] more, but layer 0 has seen \[0\]"),
        ((0,), 0, 3, r"layer 0 has seen \[3\] tokens .* is handed \[3\] more, but layer 2 has seen \[0\]"),
        ((0,), 2, 3, r"layer 2 has seen \[0\] .*, but layer 1 has seen \[0\]"),
        ((0, 1), 1, 3, r"layer 1 has seen \[3\] .*, but layer 0 has seen \[3\]"),
        ((0, 1), 0, 3, r"layer 0 has seen \[3\] .*, but layer 2 has seen \[0\]"),
        ((0, 1), 2, 4, r"layer 2 has seen \[0\] tokens .* is handed \[4\] more, but layer 1 has seen \[3\]"),
        ((0, 1, 2), 2, 3, r"layer 2 has seen \[3\] .*, but layer 1 has seen \[3\]"),
        ((0, 1, 2), 1, 1, r"layer 1 has seen \[3\] .*, but layer 0 has seen \[3\]"),
    ],
)
def test_a_layer_out_of_turn(before, layer, count, error):
    store = fed(*before)
    state = (store.seen.tolist(), store.lengths.tolist())
    with pytest.raises(BudgetError, match=error):
        store.prefill(layer, *tensors(count))
    assert (store.seen.tolist(), store.lengths.tolist()) == state


def test_a_layer_that_decodes_twice_or_never():
    store = fed(0, 1, 2)
    store.decode(0, *tensors(1))
    with pytest.raises(BudgetError, match=r"layer 0 has seen \[4\] .* but layer 2 has seen \[3\]"):
        store.decode(0, *tensors(1))
    with pytest.raises(BudgetError, match=r"layer 2 has seen \[3\] .* but layer 1 has seen \[3\]"):
        store.decode(2, *tensors(1))
    for layer in (1, 2, 0):
        store.decode(layer, *tensors(1))
    assert [held.seen.tolist() for held in store.layers] == [[5], [4], [4]]


def test_layers_of_which_one_was_told_of_padding():
    store = store_of(Recent(), [[9, 9]] * 2, batch_size=2)
    store.prefill(0, *tensors(4, 2), num_padding=[0, 2])
    with pytest.raises(BudgetError, match=r"handed \[4, 4\] more, but layer 0 has seen \[4, 2\]"):
        store.prefill(1, *tensors(4, 2))
    store.prefill(1, *tensors(4, 2), num_padding=[0, 2])
    assert store.seen.tolist() == [4, 2]


def test_decode_is_for_rows_that_have_a_token():
    store = store_of(Recent(), [5, 6], batch_size=2)
    error = r"decode takes a token behind a prompt, but the rows of layer 0 have seen {} tokens: .* through prefill"
    with pytest.raises(BudgetError, match=error.format(r"\[0, 0\]")):
        store.decode(0, *tensors(1, 2))
    store.prefill(0, *tensors(1, 2), num_padding=[0, 1])  # one token, of one row: the other is still in its padding
    with pytest.raises(BudgetError, match=error.format(r"\[1, 0\]")):
        store.decode(0, *tensors(1, 2))
    store.prefill(0, *tensors(1, 2), num_padding=[0, 1])
    store.prefill(0, *tensors(1, 2), num_padding=[0, 0])
    store.decode(0, *tensors(1, 2))
    assert store.seen.tolist() == [4, 2]
    assert [sorted(p.tolist()) for p in store.positions(0)] == [[0, 1, 2, 3]] * 2 + [[0, 1]] * 2


def test_tokens_that_came_and_were_never_kept():
    store, (query, key, value) = store_of(ValueNorm(), [5, 6]), tensors(4)
    chunk = store.arrive(0, key, value)
    error = r"layer 0 was handed tokens that it has not kept, \[4\] in all: a forward broke off"
    for again in (lambda: store.arrive(0, key, value), lambda: store.append(0, key[:, :, :1], value[:, :, :1])):
        with pytest.raises(BudgetError, match=error):
            again()
    store.keep(0, query, chunk, Scoring())
    with pytest.raises(BudgetError, match=r"layer 0 has seen \[4\] tokens, \[4\] of which .* keep \[4\]: keep takes"):
        store.keep(0, query, chunk, Scoring())
    assert store.lengths.tolist() == [[[4, 4]]]


def test_a_policy_that_broke_a_forward_off():
    store = store_of(Wrong("shape"), [5, 6])
    with pytest.raises(PluginError):
        store.prefill(0, *tensors(4))
    with pytest.raises(BudgetError, match=r"layer 0 was handed tokens that it has not kept, \[4\] in all"):
        store.prefill(0, *tensors(4))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"scale": "1"}, "scale is '1', expected a finite number"),
        ({"scale": torch.nan}, "scale is nan"),
        ({"sink_logits": torch.zeros(2)}, r"sink_logits must be a tensor \[6\], one for each query head, got \(2,\)"),
        ({"sink_logits": [0.0] * 6}, r"sink_logits must be a tensor \[6\], .* got list"),
        ({"num_padding": 2}, r"num_padding must be \[1\], one for each row, got \[\]"),
        ({"num_padding": [-1]}, r"num_padding is \[-1\], expected whole numbers from 0 to the 4 tokens"),
        ({"num_padding": [5]}, r"num_padding is \[5\]"),
        ({"num_padding": [1.5]}, r"num_padding is \[1.5\]"),
        ({"num_padding": [True]}, r"num_padding is \[True\]"),
        ({"num_padding": "a"}, "num_padding is 'a'"),
    ],
)
def test_options_of_a_prompt(options, error):
    store = store_of(Recent(), [5, 6])
    with pytest.raises(BudgetError, match=error):
        store.prefill(0, *tensors(4), **options)
    assert store.seen.tolist() == [0]


def test_padding_stands_in_front_of_a_rows_tokens():
    store = store_of(Recent(), [9, 9], batch_size=2)
    store.prefill(0, *tensors(3, 2), num_padding=[0, 3])
    with pytest.raises(BudgetError, match="num_padding is 1 for row 0, which has seen 3 tokens already"):
        store.prefill(0, *tensors(3, 2), num_padding=[1, 2])
    store.prefill(0, *tensors(3, 2), num_padding=[0, 2])
    assert store.seen.tolist() == [6, 1]


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
    with pytest.raises(BudgetError, match=r"valid=bool \[2, 4\] or None, got 4 and torch.bool \[1, 4\]"):
        store.arrive(0, key, value, torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(BudgetError, match=r"valid=bool \[2, 4\] or None, got 4 and torch.int64 \[2, 4\]"):
        store.arrive(0, key, value, torch.ones(2, 4, dtype=torch.int64))
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


@pytest.mark.parametrize("rows", [[2], [-1], [], [True, False], [0.0], [[0]]])
def test_rows_that_are_not_there(rows):
    store = store_of(Recent(), [5, 6], batch_size=2)
    store.prefill(0, *tensors(3, batch=2))
    with pytest.raises(BudgetError, match="take expects rows from 0 to 1, got"):
        store.take(torch.tensor(rows, dtype=None if rows else torch.int64))
    assert store.batch_size == 2
