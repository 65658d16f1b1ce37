"""Contexts that overlap, in one thread or in several, and what stays behind them."""

import copy
import gc
from contextlib import ExitStack
from threading import Event, Thread

import pytest
import torch
from transformers import DynamicCache

import kvpolicy
from kvpolicy import EvictionPolicy
from tests.tiny import over, tiny_ids, tiny_model

BUDGET = {"retention": 0.5, "min_tokens": 8}


class Looking(EvictionPolicy):
    """Requires what only hooks can see, and notes that it came."""

    requires = frozenset({"positions", "attention_input", "hidden_before"})
    num_sink_tokens = 4

    def __init__(self):
        self.seen = []

    def score_prompt(self, activations):
        self.seen.append(activations.attention_input.shape)
        return activations.positions.float()


def attention_of(model):
    return model.config._attn_implementation


def hooks_of(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def runs_over_a_budget(model):
    cache = kvpolicy.new_cache(model, **BUDGET)
    with torch.no_grad():
        model(tiny_ids(40), **over(cache))
    return int(cache.lengths.max()) < 40


@pytest.mark.parametrize("options", [{}, BUDGET])
def test_the_first_to_leave_does_not_detach_the_second(options):
    model = tiny_model("Llama")
    first, second = kvpolicy.attached(model, **options), kvpolicy.attached(model, **options)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert attention_of(model) != "sdpa"
    with torch.no_grad():
        out = model(tiny_ids(40), use_cache=True)
    assert any(isinstance(each, kvpolicy.RaggedCache) for each in out.values()) == bool(options)
    second.__exit__(None, None, None)
    assert attention_of(model) == "sdpa" and not hooks_of(model)


def retention_of(model):
    with torch.no_grad():
        out = model(tiny_ids(40), use_cache=True)
    (cache,) = (each for each in out.values() if isinstance(each, kvpolicy.RaggedCache))
    return cache.recipe.ask.retention


def test_the_inner_budget_holds_inside():
    model = tiny_model("Llama")
    with kvpolicy.attached(model, **BUDGET):
        with kvpolicy.attached(model, retention=0.25):
            assert retention_of(model) == 0.25
        assert retention_of(model) == 0.5


def test_each_thread_has_the_budget_of_its_own_context():
    model, entered, left, found = tiny_model("Llama"), Event(), Event(), []

    def other():
        found.append(retention_of(model))  # no context of its own
        with kvpolicy.attached(model, retention=0.25):
            found.append(retention_of(model))
            entered.set()
            left.wait(30)
            found.append(retention_of(model))

    with kvpolicy.attached(model, **BUDGET):
        thread = Thread(target=other)
        thread.start()
        entered.wait(30)
        found.append(retention_of(model))
    left.set()
    thread.join()
    assert found == [0.5, 0.25, 0.5, 0.25]
    assert attention_of(model) == "sdpa" and not hooks_of(model)


def test_a_model_that_was_attached_stays_so():
    model = tiny_model("Llama")
    kvpolicy.attach(model)
    with kvpolicy.attached(model), kvpolicy.attached(model, **BUDGET):
        pass
    assert attention_of(model) != "sdpa" and runs_over_a_budget(model)


def test_a_context_that_was_refused_counts_for_nothing():
    model = tiny_model("Llama")
    with kvpolicy.attached(model):
        with pytest.raises(kvpolicy.BudgetError), kvpolicy.attached(model, retention=2.0):
            pass
        assert runs_over_a_budget(model)
    assert attention_of(model) == "sdpa"


def test_two_threads():
    model, entered, left, found = tiny_model("Llama"), Event(), Event(), []

    def other():
        with kvpolicy.attached(model):
            entered.set()
            left.wait(30)
            found.append(runs_over_a_budget(model))

    with kvpolicy.attached(model):
        thread = Thread(target=other)
        thread.start()
        entered.wait(30)
    left.set()
    thread.join()
    assert found == [True] and attention_of(model) == "sdpa"


def test_detaching_does_not_disturb_a_stock_cache_in_another_thread():
    model = tiny_model("Llama")
    ids, options = tiny_ids(40), {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(ids, **options)
    stack = ExitStack()
    stack.enter_context(kvpolicy.attached(model))

    def leave(*_):  # between the masks and the attention of the second layer
        stack.close()

    hook = model.model.layers[1].register_forward_pre_hook(leave)
    got = model.generate(ids, **options, **over(DynamicCache(config=model.config)))
    hook.remove()
    assert attention_of(model) == "sdpa" and torch.equal(got, expected)


def test_no_hooks_stay_behind():
    model, policy = tiny_model("Llama"), Looking()
    with torch.no_grad(), kvpolicy.attached(model, policy=policy, **BUDGET):
        model(tiny_ids(40), use_cache=True)
    assert policy.seen == [(1, 40, 48)] * 3
    assert not hooks_of(model)


def test_hooks_live_as_long_as_the_caches_that_need_them():
    model, policy = tiny_model("Llama"), Looking()
    cache = kvpolicy.new_cache(model, policy=policy, **BUDGET)
    branch, second = copy.deepcopy(cache), kvpolicy.new_cache(model, policy=policy, **BUDGET)
    installed = hooks_of(model)
    assert installed == 9  # three a layer, whatever the number of caches
    del cache, second
    kvpolicy.detach(model)
    assert not hooks_of(model)
    kvpolicy.attach(model)
    assert hooks_of(model) == installed
    with torch.no_grad():
        model(tiny_ids(40), **over(branch))
    assert len(branch.store.policy.seen) == 3
    gc.disable()
    del branch
    gc.enable()
    assert not hooks_of(model)
