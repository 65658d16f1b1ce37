"""A cache that was saved and loaded goes on as one that was not, bit by bit; what cannot go on says why."""

import copy
import dataclasses
import errno
import json
import os
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

import kvpolicy
from kvpolicy import (
    BudgetAllocator,
    BudgetError,
    BudgetPlan,
    EvictionPolicy,
    KVPolicyError,
    ModelError,
    ModelSpec,
    PlanError,
    PluginError,
    hookimpl,
)
from kvpolicy.cache import store
from kvpolicy.cache.arena import LayerArena
from kvpolicy.integrations.transformers import save
from kvpolicy.integrations.transformers.cache import BudgetedLayer
from kvpolicy.plan_parts import PlanLevel
from kvpolicy.registry import _installed, registry
from tests.tiny import attention_of, tiny_ids, tiny_model

PROMPT, STEPS = 48, [1] * 6 + [7] + [1] * 10 + [2] + [1] * 2
LENGTH = PROMPT + sum(STEPS)


@dataclasses.dataclass(frozen=True, slots=True)
class Mass(EvictionPolicy):
    """Attention summed up since the prompt."""

    requires: ClassVar[frozenset[str]] = frozenset({"full_attention", "decode_attention"})
    new_entry_score: ClassVar[float] = 0.0
    num_sink_tokens: int = 2
    recent_window: int = 3

    def score_prompt(self, activations):
        return activations.full_attention

    def score_step(self, step):
        return step.scores + step.attention


@dataclasses.dataclass(frozen=True, slots=True)
class MassOfModel(BudgetAllocator):
    """Heads get entries in proportion to the attention on what they hold."""

    needs_importance: ClassVar[bool] = False
    split_scope: ClassVar[str] = "model"

    def shares(self, importance, budget):
        return torch.ones(budget.shape)

    def split(self, scores, budget):
        layers = scores[-budget.shape[0] :]
        return torch.stack([x.masked_fill(x.isinf(), 0).sum(-1).double() for x in layers], 1)


@dataclasses.dataclass(frozen=True, slots=True)
class Slanted(BudgetAllocator):
    """Later heads get more, by a parameter."""

    needs_importance: ClassVar[bool] = False
    slope: float = 1.0

    def shares(self, importance, budget):
        return 1 + self.slope * torch.arange(budget.shape[0] * budget.shape[1]).view(budget.shape)


@pytest.fixture(autouse=True)
def growing_often(monkeypatch):
    monkeypatch.setattr(store, "GROWTH_INTERVAL", 4)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """Our policy and our allocators, registered as a distribution would."""
    module = ModuleType("kvpolicy_saving")

    @hookimpl
    def kvpolicy_register(register):
        register.policy("mass", Mass)
        register.allocator("top", MassOfModel)
        register.allocator("slanted", Slanted)

    module.kvpolicy_register = kvpolicy_register
    own = SimpleNamespace(name="saving", load=lambda: module, dist=SimpleNamespace(name="saving", version="1"))
    monkeypatch.setattr(registry, "_entry_points", lambda: [*_installed(), own])
    monkeypatch.setattr(registry, "_plugins", None)
    monkeypatch.setattr(registry, "_all", [])


@pytest.fixture(scope="module")
def llama():
    return tiny_model("Llama")


def plan_of(model, levels=(0.2, 0.5), policy="streaming"):
    """A plan whose shares differ between KV heads and between its levels."""
    spec = ModelSpec.from_config(model.config)
    plan = BudgetPlan.from_capacities(spec, torch.full(spec.table_shape, 100), 1000, policy=policy)
    slope = torch.linspace(-0.6, 0.6, spec.num_budgeted_layers * spec.num_kv_heads, dtype=torch.float64)
    shares = [level * (1 + slope.roll(i).view(spec.table_shape)) for i, level in enumerate(levels)]
    return dataclasses.replace(plan, levels=tuple(map(PlanLevel, levels, shares)))


def left_padded(batch):
    """A mask [batch, LENGTH] with padding before each row's first token, another number in each."""
    mask = torch.ones(batch, LENGTH, dtype=torch.int64)
    for row in range(1, batch):
        mask[row, : 5 * row] = 0
    return mask


@torch.no_grad()
def feed(model, cache, ids, steps, mask=None):
    """Logits of the next tokens of `ids`, in forwards of `steps`."""
    parts = []
    for count in steps:
        begin = cache.get_seq_length()
        seen = None if mask is None else mask[:, : begin + count]
        part = ids[:, begin : begin + count]
        parts.append(model(part, past_key_values=cache, attention_mask=seen).logits)
    return torch.cat(parts, 1)


def facts(cache):
    """Every attribute that can matter, by name: the entries of an arena, not its free rows."""
    found = {}

    def add(owner, prefix, without=()):
        for name, value in vars(owner).items():
            if name in without:
                continue
            if isinstance(owner, LayerArena) and name in ("keys", "values", "positions", "scores"):
                rows = owner.padded_rows()
                found[f"{prefix}.rows"] = len(owner.keys)
                value = None if value is None else value[rows[rows >= 0]]
            if dataclasses.is_dataclass(value) and not isinstance(value, type):
                value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
            found[f"{prefix}.{name}"] = value

    add(cache, "cache", ("layers", "store", "make_store", "recipe", "_is_user_defined"))
    found["recipe"] = cache.recipe.to_json()
    add(cache.store, "store", ("rows", "layers", "schedule", "split", "policy"))
    add(cache.store.rows, "rows", ("schedule", "split"))
    for index, layer in enumerate(cache.store.layers):
        add(layer, f"store.{index}", ("arena",))
        add(layer.arena, f"arena.{index}")
    for index, layer in enumerate(cache.layers):
        add(layer, f"layer.{index}", ("cache",) if isinstance(layer, BudgetedLayer) else ())
    return found


def assert_same(one, other, path=""):
    assert type(one) is type(other), path
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_same(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{path}[{index}]")
    else:
        assert one == other, path


def saved(cache, model, folder, plan=None):
    """The cache, loaded from a file that it was saved to."""
    cache.save(folder / "cache.safetensors")
    loaded = kvpolicy.load_cache(model, folder / "cache.safetensors", plan)
    assert_same(facts(cache), facts(loaded))
    return loaded


def assert_goes_on(model, cache, folder, ids, mask=None, plan=None, steps=STEPS):
    """Feeds the prompt and a few tokens, then the rest to the cache and to its copy."""
    feed(model, cache, ids, [PROMPT, 1, 1], mask)
    loaded = saved(cache, model, folder, plan)
    rest = steps[2:]
    expected = feed(model, cache, ids, rest, mask)
    assert bool((cache.lengths.sum((0, 2)) < cache.store.seen * cache.lengths[:, 0].numel()).all()), (
        "nothing is evicted"
    )
    assert torch.equal(feed(model, loaded, ids, rest, mask), expected)
    assert_same(facts(cache), facts(loaded))


CASES = {
    "growing": {"retention": 0.3, "min_tokens": 8},
    "fixed": {"retention": 0.3, "context_length": 100},
    "append": {"retention": 0.3, "min_tokens": 8, "decode": "append"},
    "protected": {"retention": 0.3, "min_tokens": 8, "protected": [(10, 14), (60, 64)]},
    "everything": {"retention": 1.0},
    "slanted": {"retention": 0.3, "min_tokens": 8, "allocator": Slanted(slope=0.5)},
    "scored": {"retention": 0.3, "min_tokens": 8, "policy": "mass"},
    "scored, fixed": {"retention": 0.3, "context_length": 100, "policy": Mass(num_sink_tokens=1)},
    "split": {"retention": 0.3, "min_tokens": 8, "policy": "mass", "allocator": "top"},
    "split, fixed": {"retention": 0.3, "context_length": 100, "policy": "mass", "allocator": "top"},
}


@pytest.mark.parametrize("case", CASES)
def test_decoding_goes_on_bit_by_bit(case, llama, tmp_path):
    cache, ids, mask = kvpolicy.new_cache(llama, **CASES[case]), tiny_ids(LENGTH, batch=2), left_padded(2)
    if case != "everything":
        return assert_goes_on(llama, cache, tmp_path, ids, mask)
    feed(llama, cache, ids, [PROMPT], mask)
    loaded = saved(cache, llama, tmp_path)
    assert torch.equal(feed(llama, loaded, ids, STEPS, mask), feed(llama, cache, ids, STEPS, mask))


@pytest.mark.parametrize("policy", ["streaming", "mass"])
def test_a_growing_budget_follows_its_plan(policy, llama, tmp_path):
    plan, ids = plan_of(llama, policy=policy), tiny_ids(LENGTH, batch=2)
    cache = kvpolicy.new_cache(llama, plan, retention=0.3, min_tokens=8)
    assert_goes_on(llama, cache, tmp_path, ids, left_padded(2), plan)
    assert len(set(cache.capacities[:, 0].flatten().tolist())) > 3


def test_a_fixed_budget_of_a_plan_needs_no_plan(llama, tmp_path):
    plan, ids = plan_of(llama), tiny_ids(LENGTH)
    cache = kvpolicy.new_cache(llama, plan, retention=0.3, context_length=100)
    assert_goes_on(llama, cache, tmp_path, ids)
    assert torch.equal(cache.capacities[:, 0], plan.capacities(100, 0.3))
    kvpolicy.load_cache(llama, tmp_path / "cache.safetensors", plan)


@pytest.mark.parametrize("name", ["Gemma3Window", "GptOssWindow", "Llama4", "Qwen3Next", "Gemma3n", "Gemma4", "Llava"])
def test_stock_layers_go_on_too(name, tmp_path):
    model, ids = tiny_model(name, attention=attention_of(name)), tiny_ids(LENGTH, batch=2)
    cache = kvpolicy.new_cache(model, retention=0.3, min_tokens=8)
    mask = None if name == "Qwen3Next" else left_padded(2)
    assert_goes_on(model, cache, tmp_path, ids, mask, steps=[1] * 6 + [7] + [1] * 3)


@pytest.mark.parametrize("name", ["Llama", "Gemma3Window"])
def test_tokens_that_may_be_taken_back_are_saved(name, tmp_path):
    model, ids = tiny_model(name), tiny_ids(LENGTH)

    def propose(cache, counts):
        """Forwards of so many tokens, of which the second number is rejected."""
        parts = []
        for count, rejected in counts:
            parts.append(feed(model, cache, ids, [count]))
            cache.crop(-rejected)
        return torch.cat(parts, 1)

    cache = kvpolicy.new_cache(model, retention=0.3, min_tokens=8, rollback=6)
    cache.activate_past_recording()
    propose(cache, [(PROMPT, 0), (4, 3)])
    feed(model, cache, ids, [5])
    assert cache.store.layers[0].pending is not None
    loaded = saved(cache, model, tmp_path)
    assert loaded.recording
    for each in (cache, loaded):
        each.crop(-4)
    assert torch.equal(*(propose(each, [(3, 2), (1, 0), (4, 1)]) for each in (cache, loaded)))
    for each in (cache, loaded):
        each.stop_recording()
    assert torch.equal(*(feed(model, each, ids, [1, 3, 1]) for each in (cache, loaded)))
    assert_same(facts(cache), facts(loaded))


def test_padding_between_tokens_is_remembered(llama, tmp_path):
    cache, ids, mask = kvpolicy.new_cache(llama, retention=0.3, min_tokens=8), tiny_ids(LENGTH, batch=2), left_padded(2)
    mask[1, PROMPT : PROMPT + 3] = 0
    feed(llama, cache, ids, [PROMPT, 7], mask)
    loaded = saved(cache, llama, tmp_path)
    assert torch.equal(*(feed(llama, each, ids, [1, 4, 1], mask) for each in (cache, loaded)))
    with pytest.raises(ModelError, match="padding stands between"):
        loaded.seen_mask()


def test_a_conversation_goes_on(llama, tmp_path):
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    cache = kvpolicy.new_cache(llama, retention=0.3, min_tokens=8)
    kvpolicy.generate(llama, cache, tiny_ids(PROMPT, batch=2), **options)
    loaded = saved(cache, llama, tmp_path)
    assert loaded.unfed.shape == (2, 1)
    for length in (11, 5):
        turns = [kvpolicy.generate(llama, each, tiny_ids(length, batch=2), **options) for each in (cache, loaded)]
        assert torch.equal(*turns)
    assert_same(facts(cache), facts(loaded))


def test_why_a_conversation_ended_is_saved(llama, tmp_path):
    cache = kvpolicy.new_cache(llama, retention=0.3, min_tokens=8)
    kvpolicy.generate(llama, cache, tiny_ids(PROMPT), max_new_tokens=4, num_beams=2, do_sample=False)
    loaded = saved(cache, llama, tmp_path)
    with pytest.raises(ModelError, match="beams"):
        kvpolicy.generate(llama, loaded, tiny_ids(5))


def test_rows_that_were_taken_share_their_table(llama, tmp_path):
    cache = kvpolicy.new_cache(llama, retention=0.3, min_tokens=8)
    feed(llama, cache, tiny_ids(PROMPT, batch=2), [PROMPT], left_padded(2))
    cache.reorder_cache(torch.tensor([1, 0, 1]))
    tables = saved(cache, llama, tmp_path).store.rows.tables
    assert tables[0] is tables[2] and tables[0] is not tables[1]


def test_the_model_may_be_another_object_and_in_bf16(tmp_path):
    model, ids = tiny_model("Llama").bfloat16(), tiny_ids(LENGTH)
    cache = kvpolicy.new_cache(model, retention=0.3, min_tokens=8)
    feed(model, cache, ids, [PROMPT, 1])
    cache.save(tmp_path / "cache.safetensors")
    other = copy.deepcopy(model)
    kvpolicy.detach(other)
    loaded = kvpolicy.load_cache(other, tmp_path / "cache.safetensors")
    assert torch.equal(feed(other, loaded, ids, [1, 4, 1]), feed(model, cache, ids, [1, 4, 1]))


# What is refused


@pytest.fixture(scope="module")
def file(llama, tmp_path_factory):
    """(path, plan) of a saved cache that grows under a plan."""
    path, plan = tmp_path_factory.mktemp("saved") / "cache.safetensors", plan_of(llama)
    cache = kvpolicy.new_cache(llama, plan, retention=0.3, min_tokens=8)
    feed(llama, cache, tiny_ids(LENGTH, batch=2), [PROMPT, 1], left_padded(2))
    cache.save(path)
    return path, plan


def parts(path):
    with safe_open(path, "pt") as opened:
        document = json.loads(opened.metadata()["kvpolicy"])
        return document, {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118


def rewritten(path, folder, change):
    """A file whose document and tensors were changed, its checksum right again."""
    document, tensors = parts(path)
    change(document, tensors)
    document.pop("crc32", None)
    (folder / "changed.safetensors").write_bytes(save.file_bytes(document, tensors))
    return folder / "changed.safetensors"


def error_of(call):
    with pytest.raises(KVPolicyError) as caught:
        call()
    return caught.value


def set_in(*path):
    """A change of one value of the document, the last of `path`."""

    def change(document, _):
        for key in path[:-2]:
            document = document[key]
        document[path[-2]] = path[-1]

    return change


def add_to(name, amount, at=0):
    """A change of one element of a tensor."""

    def change(_, tensors):
        tensors[name].view(-1)[at] += amount

    return change


def tensor_is(name, value):
    return lambda _, tensors: tensors.update({name: value})


def without(name):
    return lambda _, tensors: tensors.pop(name)


REFUSED = {
    "format": (set_in("format", "kvpolicy-plan"), KVPolicyError, "format is 'kvpolicy-plan', expected"),
    "version": (set_in("version", 2), KVPolicyError, "version is 2, expected 1"),
    "no version": (lambda d, _: d.pop("version"), KVPolicyError, "damaged: version is missing"),
    "model type": (set_in("model", "model_type", "qwen3"), ModelError, "a model of type qwen3, this one has llama"),
    "table shape": (set_in("model", "table_shape", [3, 4]), ModelError, r"heads\) \[3, 4\], this one has \[3, 2\]"),
    "configuration": (set_in("model", "config_sha256", "0" * 64), ModelError, "the configurations differ"),
    "dtype": (set_in("model", "dtype", "bfloat16"), ModelError, "are bfloat16, the model is float32"),
    "ranks": (set_in("store", "heads", [1, 1]), ModelError, "holds 1 KV heads from head 1 on"),
    "policy": (set_in("recipe", "policy", "name", "streamin"), PluginError, "no policy named 'streamin'"),
    "class": (set_in("recipe", "policy", "class", "a.B"), PluginError, "StreamingPolicy here, but was a.B"),
    "params": (set_in("recipe", "policy", "params", {"sinks": 1}), PluginError, "no parameter 'sinks'"),
    "decode": (set_in("recipe", "decode", "drop"), PlanError, "recipe.decode is 'drop'"),
    "span": (set_in("recipe", "protected", [[4, 1]]), BudgetError, "protected span"),
    "retention": (set_in("recipe", "retention", 0.01), PlanError, "below the plan's lowest level"),
    "rows": (set_in("store", "rows", [0, 7]), KVPolicyError, "sequence 1 has table 7, but there are 2"),
    "no rows": (set_in("store", "rows", []), KVPolicyError, "it holds no sequence"),
    "row of seen": (set_in("store", "seen", [48]), KVPolicyError, "store.seen has 1 items, expected 2"),
    "layers": (set_in("store", "layers", []), KVPolicyError, r"store.layers has 0 items, expected 3"),
    "a layer": (set_in("store", "layers", 1, None), KVPolicyError, "a layer is missing|belongs to nothing"),
    "decoded": (set_in("store", "layers", 0, "decoded", -1), KVPolicyError, "decoded is -1"),
    "ring": (set_in("store", "layers", 0, "is_ring", 1), KVPolicyError, "is_ring is 1, expected true or false"),
    "columns": (set_in("columns", [49, 50, 49]), KVPolicyError, "different numbers of columns"),
    "few columns": (
        set_in("columns", [40, 40, 40]),
        KVPolicyError,
        r"columns\[0\] is 40, expected a whole number from",
    ),
    "holes": (set_in("has_holes", 0), KVPolicyError, "has_holes is 0, expected a list"),
    "recording": (set_in("recording", None), KVPolicyError, "recording is null"),
    "ended": (set_in("ended", 3), KVPolicyError, "ended is 3, expected a text"),
    "stock": (set_in("stock", []), ModelError, "saved under transformers .* with 0 layers"),
    "kind of layer": (set_in("stock", 0, {"class": "X", "state": {}}), KVPolicyError, "budgeted in the file or in the"),
    "missing": (without("layers.1.keys"), KVPolicyError, "tensor 'layers.1.keys' is missing"),
    "surplus": (tensor_is("more", torch.ones(1)), KVPolicyError, "tensor 'more' belongs to nothing"),
    "unfed": (
        tensor_is("unfed", torch.ones(3, 1, dtype=torch.int64)),
        KVPolicyError,
        r"'unfed' is .*expected.*\[2, n\]",
    ),
    "heads": (tensor_is("layers.0.table", torch.ones(2, 4)), KVPolicyError, r"\[2, 4\], expected torch.int64 \[2, 2\]"),
    "half": (lambda _, t: t.update({"layers.0.keys": t["layers.0.keys"].half()}), KVPolicyError, "is torch.float16"),
    "start": (add_to("layers.0.start", 1, at=1), KVPolicyError, "'layers.0.start' is"),
    "allocated": (add_to("layers.0.allocated", 10**6, at=3), KVPolicyError, "'layers.0.allocated' is"),
    "longer": (add_to("layers.0.length", 1), KVPolicyError, "'layers.0.(length|allocated|keys)' is"),
    "too long": (add_to("layers.0.length", 10**9), KVPolicyError, "'layers.0.length' is"),
    "negative": (add_to("layers.0.length", -(10**9)), KVPolicyError, "'layers.0.length' is"),
    "capacity": (add_to("layers.0.table", -10), KVPolicyError, "'layers.0.table' is|'layers.0.length' is"),
    "huge capacity": (add_to("layers.0.table", 2**40), KVPolicyError, "'layers.0.table' is"),
    "cursor": (add_to("layers.0.cursor", 10**6), KVPolicyError, "'layers.0.cursor' is"),
    "seen": (add_to("layers.0.seen", 1), KVPolicyError, "seen different numbers of tokens"),
    "evicted": (add_to("layers.0.evicted_at", 10**6), KVPolicyError, "'layers.0.evicted_at' is"),
    "position": (add_to("layers.0.positions", 10**6), KVPolicyError, "'layers.0.positions' is"),
    "twice": (add_to("layers.0.positions", 1), KVPolicyError, "'layers.0.positions' holds a token twice"),
    "not finite": (
        add_to("layers.2.values", float("nan")),
        KVPolicyError,
        "'layers.2.values' holds numbers that are not",
    ),
    "table": (add_to("rows", 2**40), KVPolicyError, "'rows' is"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(case, llama, file, tmp_path):
    change, kind, reason = REFUSED[case]
    path = rewritten(file[0], tmp_path, change)
    error = error_of(lambda: kvpolicy.load_cache(llama, path, file[1]))
    assert type(error) is kind
    assert str(error).startswith(f"cache file '{path}': ")
    with pytest.raises(KVPolicyError, match=reason):
        raise error


def test_a_file_that_was_rewritten_without_a_change_is_loaded(llama, file, tmp_path):
    path = rewritten(file[0], tmp_path, lambda *_: None)
    assert kvpolicy.load_cache(llama, path, file[1]).get_seq_length() == PROMPT + 1


STOCK_REFUSED = {
    "class": (set_in("stock", 0, "class", "Quantized"), ModelError, "is Quantized, this transformers uses Dynamic"),
    "attribute": (set_in("stock", 0, "state", "update", 1), ModelError, "stock.0..state.update is an attribute"),
    "missing": (lambda d, _: d["stock"][0]["state"].pop("record_past"), ModelError, "record_past is missing"),
    "setting": (set_in("stock", 0, "state", "sliding_window", 7), KVPolicyError, "is 7, but a fresh layer has 32"),
    "kind": (set_in("stock", 0, "state", "record_past", 1), KVPolicyError, "is 1, but a fresh layer has False"),
    "text": (set_in("stock", 0, "state", "cumulative_length", "x"), KVPolicyError, "is 'x', but a fresh layer has 0"),
    "length": (set_in("stock", 0, "state", "cumulative_length", 3), KVPolicyError, "has seen 3 columns, others 49"),
    "keys": (
        lambda _, t: t.update({"stock.0.keys": t["stock.0.keys"][:1]}),
        KVPolicyError,
        r"stock\[0\].state.keys does not fit: expected torch.float32 \[2, 2, up to 49, dim\]",
    ),
}


@pytest.mark.parametrize("case", STOCK_REFUSED)
def test_a_stock_layer_that_does_not_fit_is_refused(case, tmp_path):
    model = tiny_model("Gemma3Window")
    cache = kvpolicy.new_cache(model, retention=0.3, min_tokens=8)
    feed(model, cache, tiny_ids(LENGTH, batch=2), [PROMPT, 1])
    cache.save(tmp_path / "cache.safetensors")
    change, kind, reason = STOCK_REFUSED[case]
    path = rewritten(tmp_path / "cache.safetensors", tmp_path, change)
    with pytest.raises(kind, match=reason):
        kvpolicy.load_cache(model, path)


def test_pending_tokens_that_do_not_fit_are_refused(llama, tmp_path):
    cache = kvpolicy.new_cache(llama, retention=0.3, min_tokens=8, rollback=6)
    cache.activate_past_recording()
    feed(llama, cache, tiny_ids(LENGTH), [PROMPT])
    cache.save(tmp_path / "cache.safetensors")
    path = rewritten(tmp_path / "cache.safetensors", tmp_path, add_to("layers.1.pending.positions", 1))
    with pytest.raises(KVPolicyError, match=r"'layers.1.pending.positions' is"):
        kvpolicy.load_cache(llama, path)


def test_a_plan_must_be_the_one_of_the_cache(llama, file, tmp_path):
    path, plan = file
    with pytest.raises(PlanError, match=r"give that plan again with plan= \(sha256 [0-9a-f]{64}\)"):
        kvpolicy.load_cache(llama, path)
    with pytest.raises(PlanError, match="made under another plan"):
        kvpolicy.load_cache(llama, path, plan_of(llama, levels=(0.2, 0.6)))
    kvpolicy.save_plan(plan, tmp_path / "plan.json")
    kvpolicy.load_cache(llama, path, kvpolicy.load_plan(tmp_path / "plan.json"))
    cache = kvpolicy.new_cache(llama, retention=0.3)
    feed(llama, cache, tiny_ids(9), [9])
    cache.save(tmp_path / "cache.safetensors")
    with pytest.raises(PlanError, match="made without a plan"):
        kvpolicy.load_cache(llama, tmp_path / "cache.safetensors", plan)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (lambda: tiny_model("Qwen3"), "a model of type llama, this one has qwen3"),
        (lambda: tiny_model("Llama", layers=2), r"heads\) \[3, 2\], this one has \[2, 2\]"),
        (lambda: tiny_model("Llama", rope_theta=500.0), "the configurations differ"),
        (lambda: tiny_model("Llama").bfloat16(), "are float32, the model is bfloat16"),
    ],
)
def test_another_model_is_refused(other, reason, file):
    with pytest.raises(ModelError, match=reason):
        kvpolicy.load_cache(other(), file[0], file[1])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "damaged or no cache"),
        (b'{"format": "kvpolicy-plan"}', "damaged or no cache"),
        (b"\xff" * 64, "damaged or no cache"),
        (b"\x02" + b"\0" * 7 + b"{}", "another safetensors file"),
    ],
)
def test_a_foreign_file_is_refused(content, reason, llama, tmp_path):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(KVPolicyError, match=rf"cache file '.*file': .*{reason}"):
        kvpolicy.load_cache(llama, tmp_path / "file")


def test_what_is_no_file_is_refused(llama, tmp_path):
    with pytest.raises(KVPolicyError, match="cannot be read: No such file"):
        kvpolicy.load_cache(llama, tmp_path / "nothing")
    with pytest.raises(KVPolicyError, match="cannot be read: Is a directory"):
        kvpolicy.load_cache(llama, tmp_path)
    save_file({"weight": torch.ones(2)}, tmp_path / "weights.safetensors", metadata={"format": "pt"})
    with pytest.raises(KVPolicyError, match="another safetensors file"):
        kvpolicy.load_cache(llama, tmp_path / "weights.safetensors")


def test_a_file_that_was_cut_off_is_refused(llama, file, tmp_path):
    content = file[0].read_bytes()
    for length in (7, 8, 100, len(content) // 2, len(content) - 1):
        (tmp_path / "cut").write_bytes(content[:length])
        with pytest.raises(KVPolicyError, match="damaged or no cache"):
            kvpolicy.load_cache(llama, tmp_path / "cut", file[1])


@settings(max_examples=80, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(1, 255), in_header=st.booleans())
def test_one_byte_that_differs_is_noticed(llama, file, tmp_path_factory, place, value, in_header):
    content = bytearray(file[0].read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    at = int(place * header) if in_header else header + int(place * (len(content) - header))
    content[at] ^= value
    path = tmp_path_factory.getbasetemp() / "flipped.safetensors"
    path.write_bytes(content)
    try:
        loaded = kvpolicy.load_cache(llama, path, file[1])
    except KVPolicyError as error:
        assert str(error).startswith(f"cache file '{path}': ")
    else:  # white space between two fields
        assert_same(facts(loaded), facts(kvpolicy.load_cache(llama, *file)))


def test_what_cannot_be_saved_says_why(llama, tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Unknown(Mass):
        pass

    path = tmp_path / "cache.safetensors"
    with pytest.raises(ModelError, match="the cache was not saved: this cache is empty"):
        kvpolicy.new_cache(llama, retention=0.3).save(path)
    cache = kvpolicy.new_cache(llama, retention=0.3, policy=Unknown())
    feed(llama, cache, tiny_ids(9), [9])
    with pytest.raises(PluginError, match=r"the policy .*Unknown is not registered"):
        cache.save(path)
    cache = kvpolicy.new_cache(llama, retention=0.3)
    feed(llama, cache, tiny_ids(9), [9])
    cache.layers[0].update(torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16))
    with pytest.raises(ModelError, match="in the middle of a forward"):
        cache.save(path)
    cache = kvpolicy.new_cache(llama, retention=0.3)
    feed(llama, cache, tiny_ids(9), [9])
    cache.store.layers[1].arena.keys[3] = float("inf")
    with pytest.raises(KVPolicyError, match="keys or values that are not finite"):
        cache.save(path)
    assert not path.exists()


def test_a_failed_write_leaves_the_old_file(llama, tmp_path, monkeypatch):
    path = tmp_path / "cache.safetensors"
    cache = kvpolicy.new_cache(llama, retention=0.3, min_tokens=8)
    feed(llama, cache, tiny_ids(LENGTH), [PROMPT])
    cache.save(path)
    before = path.read_bytes()
    feed(llama, cache, tiny_ids(LENGTH), [1])

    def full_disk(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(KVPolicyError, match=r"the cache was not saved: cannot write .*: No space left"):
        cache.save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    with pytest.raises(KVPolicyError, match=r"the cache was not saved: cannot write"):
        cache.save(tmp_path / "nowhere" / "cache.safetensors")
