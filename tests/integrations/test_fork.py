"""A fork is the cache as it was, and what becomes of either changes nothing in the other."""

import copy

import pytest
import torch

import kvpolicy
from kvpolicy.errors import BudgetError, ModelError
from tests.integrations.ragged_oracle import stepped_logits
from tests.tiny import over, tiny_ids, tiny_model

BUDGETS = {
    "streaming": {"retention": 0.5, "min_tokens": 8},
    "snapkv": {"retention": 0.5, "min_tokens": 8, "policy": "snapkv"},
    "h2o": {"retention": 0.4, "min_tokens": 8, "policy": "h2o", "context_length": 60},
}


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("architecture", ["Llama", "Gemma3Window", "Gemma3n", "Qwen3Next"])
@torch.no_grad()
def test_both_go_on_as_if_alone(architecture, budget):
    model = tiny_model(architecture)
    ids, others = tiny_ids(60), tiny_ids(12).flip(1)
    cache = kvpolicy.new_cache(model, **BUDGETS[budget])
    stepped_logits(model, ids[:, :40], cache, [40])
    expected = [copy.deepcopy(cache) for _ in range(2)]
    expected = stepped_logits(model, ids[:, 40:], expected[0], [20]), stepped_logits(model, others, expected[1], [12])
    fork = cache.fork()
    assert torch.equal(stepped_logits(model, others, fork, [12]), expected[1])
    assert (cache.get_seq_length(), fork.get_seq_length()) == (40, 52)
    assert torch.equal(stepped_logits(model, ids[:, 40:], cache, [20]), expected[0])
    assert fork.get_seq_length() == 52 and fork.nbytes > 0


@torch.no_grad()
def test_tokens_decoded_in_turn_do_not_meet():
    model = tiny_model("Llama")
    first, second = tiny_ids(20), tiny_ids(20).flip(1)
    cache = kvpolicy.new_cache(model, **BUDGETS["h2o"])
    stepped_logits(model, tiny_ids(40), cache, [40])
    alone = [stepped_logits(model, ids, copy.deepcopy(cache), [1] * 20) for ids in (first, second)]
    fork = cache.fork()
    turns = [[], []]
    for token in range(20):
        for logits, ids, own in zip(turns, (first, second), (cache, fork), strict=True):
            logits.append(model(ids[:, token : token + 1], **over(own)).logits)
    assert all(torch.equal(torch.cat(logits, 1), wanted) for logits, wanted in zip(turns, alone, strict=True))


def test_a_conversation_goes_on_in_a_fork():
    model = tiny_model("Llama")
    options = {"max_new_tokens": 6, "do_sample": False}
    cache = kvpolicy.new_cache(model, **BUDGETS["snapkv"])
    kvpolicy.generate(model, cache, tiny_ids(40), **options)
    fork = cache.fork()
    answers = [kvpolicy.generate(model, each, tiny_ids(9), **options) for each in (fork, cache)]
    assert torch.equal(*answers) and fork.report() == cache.report()


def test_an_empty_cache_can_be_forked():
    model = tiny_model("Llama")
    fork = kvpolicy.new_cache(model, **BUDGETS["streaming"]).fork()
    with torch.no_grad():
        model(tiny_ids(40), **over(fork))
    assert all(layer.cache is fork for layer in fork.budgeted)


def test_what_cannot_be_forked():
    model = tiny_model("Llama")
    cache = kvpolicy.new_cache(model, **BUDGETS["streaming"])

    def stop(*_):
        raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_pre_hook(stop)
    with torch.no_grad(), pytest.raises(KeyboardInterrupt):
        model(tiny_ids(40), **over(cache))
    hook.remove()
    with pytest.raises(ModelError, match="a forward broke off"):
        cache.fork()


@pytest.mark.parametrize("policy", ["streaming", "snapkv"])
def test_budgets_tried_on_copies_of_one_prompt(policy, tmp_path):
    """A copy whose budget is lowered holds what a cache holds that had it from the beginning, and goes on as that."""
    model, ids = tiny_model("Llama"), tiny_ids(60)
    spec = kvpolicy.ModelSpec.from_config(model.config)
    whole = kvpolicy.new_cache(model, policy=policy, retention=0.9, context_length=60)
    stepped_logits(model, ids[:, :45], whole, [45])
    for entries in (12, 30):
        table = entries + torch.arange(6).view(spec.table_shape)
        plan = kvpolicy.BudgetPlan.from_capacities(spec, table, 60, policy=policy)
        own, tried = kvpolicy.new_cache(model, plan, context_length=60), whole.fork()
        stepped_logits(model, ids[:, :45], own, [45])
        tried.rebudget(table)
        assert torch.equal(tried.lengths[:, 0], table) and torch.equal(tried.capacities, own.capacities)
        tried.save(tmp_path / "cache.kv")
        loaded = kvpolicy.load_cache(model, tmp_path / "cache.kv")
        expected, *found = (stepped_logits(model, ids[:, 45:], each, [1] * 15) for each in (own, tried, loaded))
        for logits in found:
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert whole.lengths.unique().tolist() == [45]


def test_a_budget_that_cannot_be_taken_is_refused():
    model = tiny_model("Llama")
    cache = kvpolicy.new_cache(model, policy="snapkv", retention=1.0)
    with pytest.raises(ModelError, match="a prompt comes first"):
        cache.rebudget(torch.full((3, 2), 9))
    stepped_logits(model, tiny_ids(20), cache, [20])
    with pytest.raises(BudgetError, match=r"SnapKVPolicy has scored nothing: make it with retention= below 1"):
        cache.rebudget(torch.full((3, 2), 9))
    cache = kvpolicy.new_cache(model, retention=0.5)
    stepped_logits(model, tiny_ids(20), cache, [20])
    with pytest.raises(BudgetError, match=r"the table has shape \(2, 3\), the model has \(3, 2\)"):
        cache.rebudget(torch.full((2, 3), 9))
    assert cache.lengths.unique().tolist() == [20]


def test_drafts_have_their_rollback_behind_what_was_held():
    """What a turn held on top before says nothing of the drafts of a later one."""
    model, ids = tiny_model("Llama"), tiny_ids(40)
    cache = kvpolicy.new_cache(model, retention=0.5, min_tokens=8, rollback=6)
    with torch.no_grad():
        model(ids[:, :30], **over(cache))
        cache.hold(1)
        model(ids[:, 30:31], **over(cache))
        cache.stop_recording()
        cache.activate_past_recording()
        model(ids[:, 31:37], **over(cache))
    cache.crop(-6)
    assert cache.get_seq_length() == 31
