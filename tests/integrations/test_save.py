"""A cache that was saved and loaded holds the same bit by bit, and goes on as one that was not."""

import copy
import dataclasses
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import pytest
import torch

import kvpolicy
from kvpolicy import BudgetAllocator, EvictionPolicy, ModelError, hookimpl
from kvpolicy.cache import store_decoding
from kvpolicy.plugins.registry import _installed, registry
from tests.integrations.saving import LENGTH, PROMPT, STEPS, assert_same, facts, feed, left_padded, plan_of
from tests.tiny import attention_of, tiny_ids, tiny_model


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


NEAR = 1e-5
"""Of two continuations in float32, whose entries lie in other orders."""


def assert_near(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=NEAR)


@pytest.fixture(autouse=True)
def growing_often(monkeypatch):
    monkeypatch.setattr(store_decoding, "GROWTH_INTERVAL", 4)


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
    monkeypatch.setattr(registry, "_all", {})
    monkeypatch.setattr(registry, "_named", {})


@pytest.fixture(scope="module")
def llama():
    return tiny_model("Llama")


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
    assert_near(feed(model, loaded, ids, rest, mask), expected)
    assert_same(facts(cache), facts(loaded), slack=NEAR)


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
def test_decoding_goes_on(case, llama, tmp_path):
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


LAYOUTS = {
    "a ring that has turned": {"retention": 0.3, "context_length": 100},
    "one that grows": {"retention": 0.3, "min_tokens": 8},
    "spans to come": {"retention": 0.3, "context_length": 100, "protected": [(10, 14), (60, 64)]},
    "the order of scores": {"retention": 0.3, "context_length": 100, "policy": "snapkv"},
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_a_file_says_nothing_of_how_entries_lie(case, llama, tmp_path):
    """Turned back and with other room, a cache makes the same file, and what is loaded goes on as both do."""
    cache, ids = kvpolicy.new_cache(llama, **LAYOUTS[case]), tiny_ids(LENGTH, batch=2)
    feed(llama, cache, ids, [PROMPT, *[1] * 7], left_padded(2))
    assert bool(cache.store.layers[0].arena.cursor.any()) == (case != "spans to come")
    other = cache.fork()
    for layer in other.store.layers:
        layer.arena.relayout(layer.arena.allocated + 37)
    for name, each in (("one", cache), ("other", other)):
        each.save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    loaded = kvpolicy.load_cache(llama, tmp_path / "other")
    assert_same(facts(cache), facts(loaded))
    expected, *found = (feed(llama, each, ids, [*[1] * 8, 3, 1], left_padded(2)) for each in (cache, other, loaded))
    for logits in found:
        assert_near(logits, expected)
    kept = [[sorted(x.tolist()) for layer in range(3) for x in each.store.positions(layer)] for each in (cache, loaded)]
    assert kept[0] == kept[1]


def test_padding_between_tokens_is_remembered(llama, tmp_path):
    cache, ids, mask = kvpolicy.new_cache(llama, retention=0.3, min_tokens=8), tiny_ids(LENGTH, batch=2), left_padded(2)
    mask[1, PROMPT : PROMPT + 3] = 0
    feed(llama, cache, ids, [PROMPT, 7], mask)
    loaded = saved(cache, llama, tmp_path)
    assert torch.equal(*(feed(llama, each, ids, [1, 4, 1], mask) for each in (cache, loaded)))
    assert torch.equal(loaded.seen_mask(), mask[:, : PROMPT + 13])


def test_a_conversation_goes_on(llama, tmp_path):
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    cache = kvpolicy.new_cache(llama, retention=0.3, min_tokens=8)
    kvpolicy.generate(llama, cache, tiny_ids(PROMPT, batch=2), **options)
    loaded = saved(cache, llama, tmp_path)
    assert loaded.unfed.shape == (2, 1)
    for length in (11, 5):
        turns = [kvpolicy.generate(llama, each, tiny_ids(length, batch=2), **options) for each in (cache, loaded)]
        assert torch.equal(*turns)
    assert_same(facts(cache), facts(loaded), slack=NEAR)


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
    found, expected = feed(other, loaded, ids, [1, 4, 1]), feed(model, cache, ids, [1, 4, 1])
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)
