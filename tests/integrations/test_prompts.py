"""Prompts that are run once: every cache made of them is the one that the table or the allocator gives by itself."""

import pytest
import torch

from kvpolicy import BudgetError, ModelSpec, PluginError, registry
from kvpolicy.integrations.transformers import Prompts, attached, prompt_cache
from kvpolicy.integrations.transformers.attention.attachment import is_attached
from kvpolicy.integrations.transformers.probes import prefilled
from tests.tiny import over, tiny_ids, tiny_model

LENGTH = 60
POLICIES = [("snapkv", {"observation_window": 8, "recent_window": 4}), ("h2o", {}), ("streaming", {})]


def alone(model, ids, policy, table, allocator):
    cache = prompt_cache(model, policy, table, allocator)
    logits = model(ids, **over(cache), use_cache=True).logits[:, -1:]
    return cache, logits


def check_same(model, found, expected, ids):
    for cache in (found[0], expected[0]):
        cache.check_enforced()
    assert torch.equal(found[0].lengths, expected[0].lengths)
    for layer in range(found[0].spec.num_budgeted_layers):
        held, others = (cache.opened().positions(layer) for cache in (found[0], expected[0]))
        assert [sorted(each.tolist()) for each in held] == [sorted(each.tolist()) for each in others]
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-5)
    token = ids[:, :1]
    behind = [model(token, **over(cache), use_cache=True).logits for cache, _ in (found, expected)]
    torch.testing.assert_close(*behind, rtol=0, atol=1e-5)


@pytest.mark.parametrize("allocator", [None, "adakv", "kv_compress"])
@pytest.mark.parametrize(("name", "params"), POLICIES)
def test_each_cache_is_as_if_it_had_come_alone(name, params, allocator):
    model, ids = tiny_model("Llama"), tiny_ids(LENGTH, batch=3)
    policy, shape = registry.create("policy", name, params), ModelSpec.from_config(model.config).table_shape
    splits = None if allocator is None else registry.create("allocator", allocator)
    tables = [torch.full(shape, 20), torch.linspace(8, 40, shape[0] * shape[1]).long().view(shape)]
    made = Prompts(model, torch.split(ids, 2), policy)
    with torch.no_grad(), attached(model):
        for table in (*tables, tables[0]):
            for index, batch in enumerate(torch.split(ids, 2)):
                found = made.compressed(index, table, splits)
                check_same(model, found, alone(model, batch, policy, table, splits), batch)
                assert int(found[0].lengths.sum()) > 0


@pytest.mark.parametrize(("kept", "forwards"), [(10**9, 2), (0, 4)])
def test_prompts_run_once_as_far_as_memory_reaches(monkeypatch, kept, forwards):
    monkeypatch.setattr(prefilled, "KEPT_BYTES", kept)
    model, ids, seen = tiny_model("Llama"), tiny_ids(LENGTH, batch=2), []
    made = Prompts(model, torch.split(ids, 1), registry.create("policy", "h2o"))
    model.register_forward_hook(lambda *_: seen.append(1))
    for capacity in (20, 30):
        for index in range(2):
            made.compressed(index, torch.full((3, 2), capacity), registry.create("allocator", "adakv"))
    assert len(seen) == forwards and made.nbytes <= kept and (made.nbytes > 0) == (kept > 0)


def test_prompts_attach_the_model_themselves_and_take_no_gradients():
    model, ids = tiny_model("Llama"), tiny_ids(LENGTH)
    prompts = Prompts(model, [ids], registry.create("policy", "h2o"))
    table, behind = torch.full((3, 2), 20), tiny_ids(7)
    cache, before = prompts.compressed(0, table)
    found = prompts.logits(0, table, behind)
    assert not is_attached(model)
    assert not found.requires_grad and not before.requires_grad
    expected = [before]
    with torch.no_grad(), attached(model):
        for column in range(7):
            expected.append(model(behind[:, column : column + 1], **over(cache), use_cache=True).logits)
    assert torch.equal(cache.lengths, torch.full((3, 1, 2), 27)), "what follows the prompt is on top"
    torch.testing.assert_close(found, torch.cat(expected, 1), rtol=0, atol=1e-5)


def test_what_cannot_be_is_refused():
    model, ids = tiny_model("Llama"), tiny_ids(LENGTH)
    with pytest.raises(PluginError, match=r"KVzipPolicy requires repeat_attention: .* give tokenizer="):
        Prompts(model, [ids], registry.create("policy", "kvzip"))
    made = Prompts(model, [ids], registry.create("policy", "h2o"))
    with pytest.raises(BudgetError, match="does not split at run time"):
        made.compressed(0, torch.full((3, 2), 20), registry.create("allocator", "pyramid"))
