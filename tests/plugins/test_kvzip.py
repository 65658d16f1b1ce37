import pytest
import torch
from kvpolicy_baselines.kvzip import KVzipPolicy

import kvpolicy
from kvpolicy import PluginError
from kvpolicy.testing import check_eviction_policy
from tests.plugins.direct import best, ids_of, kept
from tests.tiny import over, tiny_model

INSTRUCTION = torch.tensor([5, 6, 7, 8])


def formula(model, ids, size):
    """{(layer, head): score of each position}, from the attention of a dense model, in loops."""
    length, scores = ids.shape[1], {}
    for begin in range(0, length, size):
        whole = torch.cat([ids, INSTRUCTION[None], ids[:, begin : begin + size]], 1)
        with torch.no_grad():
            attentions = model(whole, output_attentions=True, use_cache=False).attentions
        for layer, attention in enumerate(attentions):
            for query_head, rows in enumerate(attention[0].double().tolist()):
                own = scores.setdefault((layer, query_head // 3), [0.0] * length)
                for row in rows[length:]:
                    own[:] = [max(a, b) for a, b in zip(own, row[:length], strict=True)]
    return scores


def compressed(ids, policy, mask=None, **options):
    """A cache of the tiny Llama whose context was repeated."""
    model = tiny_model("Llama")
    cache = kvpolicy.new_cache(model, policy=policy, min_tokens=8, **options)
    with torch.no_grad():
        model(ids, attention_mask=mask, **over(cache))
    kvpolicy.repeat_context(model, cache, ids, INSTRUCTION, attention_mask=mask)
    return cache


def test_laws():
    check_eviction_policy(KVzipPolicy)


@pytest.mark.parametrize("size", [2048, 25])
@pytest.mark.parametrize("allocator", ["uniform", "pyramid", "adakv"])
def test_keeps_the_formulas_best(size, allocator):
    ids = ids_of(60)
    policy = KVzipPolicy(repeat_chunk=size)
    cache = compressed(ids, policy, retention=0.3, allocator=allocator)
    scores = formula(tiny_model("Llama", attention="eager"), ids, size)
    expected = {
        (layer, head): best(dict(enumerate(own)), int(cache.capacities[layer, 0, head]), seen=60, sinks=4)
        for (layer, head), own in scores.items()
    }
    assert kept(cache) == expected
    assert int(cache.lengths.sum()) == round(0.3 * 60 * 3 * 2)
    for positions in expected.values():
        assert positions != [*range(4), *range(60 - len(positions) + 4, 60)], "no more than recency"


def test_the_default_repeats_2048_tokens_at_a_time():
    policy = kvpolicy.registry.create("policy", "kvzip")
    assert policy.params() == {"repeat_chunk": 2048, "num_sink_tokens": 4}


@pytest.mark.parametrize("allocator", ["uniform", "adakv"])
def test_a_full_budget_gives_the_tokens_of_the_stock_cache(allocator):
    """By a retention of 1, which repeats nothing, and by one that happens to evict nothing, after a repetition."""
    model, ids = tiny_model("Llama"), ids_of(60)
    expected = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    for retention in (1.0, 0.9):
        cache = kvpolicy.new_cache(model, policy="kvzip", allocator=allocator, retention=retention)
        with torch.no_grad():
            logits = model(ids, **over(cache)).logits
        if retention < 1:
            kvpolicy.repeat_context(model, cache, ids, INSTRUCTION)
        mask = torch.ones(1, 61, dtype=torch.int64)
        first = logits[:, -1:].argmax(-1)
        more = model.generate(
            first, attention_mask=mask, **over(cache), max_new_tokens=11, do_sample=False, eos_token_id=None
        )
        assert torch.equal(torch.cat([ids, more], 1), expected)
        assert not cache.report().evicted


def test_a_plans_shares_take_it_too():
    model, ids = tiny_model("Llama"), ids_of(60)
    table = torch.tensor([[10, 30], [20, 16], [12, 8]])
    plan = kvpolicy.BudgetPlan.from_capacities(kvpolicy.ModelSpec.from_config(model.config), table, context_length=60)
    cache = kvpolicy.new_cache(model, plan, policy="kvzip", context_length=60)
    with torch.no_grad():
        model(ids, **over(cache))
    kvpolicy.repeat_context(model, cache, ids, INSTRUCTION)
    assert torch.equal(cache.lengths[:, 0], table)


def test_a_system_prompt_stays_on_top():
    cache = compressed(ids_of(60), "kvzip", retention=0.3, protected=[(0, 10)])
    assert all(set(range(10)) <= set(positions) for positions in kept(cache).values())
    assert int(cache.lengths.sum()) == round(0.3 * 60 * 6) + 6 * 6


@pytest.mark.parametrize("allocator", ["uniform", "adakv"])
def test_a_padded_row_keeps_what_it_keeps_alone(allocator):
    short, long = ids_of(40), ids_of(64)
    ids = torch.cat([torch.nn.functional.pad(short, (24, 0)), long])
    mask = (torch.arange(64)[None] >= torch.tensor([24, 0])[:, None]).long()
    policy, options = KVzipPolicy(repeat_chunk=30), {"retention": 0.3, "allocator": allocator}
    together = kept(compressed(ids, policy, mask=mask, **options))
    for row, alone in enumerate((short, long)):
        own = kept(compressed(alone, policy, **options))
        assert {(layer, head): together[layer, row * 2 + head] for layer, head in own} == own


def test_bad_parameters_are_refused():
    with pytest.raises(PluginError, match="kvzip: repeat_chunk must be at least 1, got 0"):
        KVzipPolicy(repeat_chunk=0)


def test_smollm2_has_its_prompt_repeated(smollm2):
    """The instruction is the tokenizer's, in its chat template."""
    model, tokenizer = smollm2
    text = "The ship Aurora left Bergen on 12 May with nine sailors and forty crates of dried fish. " * 2
    ids = tokenizer(text, return_tensors="pt").input_ids
    length, cache = ids.shape[1], kvpolicy.new_cache(model, policy="kvzip", retention=0.5, min_tokens=8)
    try:
        out = kvpolicy.generate(model, cache, ids, tokenizer=tokenizer, max_new_tokens=4, do_sample=False)
    finally:
        kvpolicy.detach(model)
    assert out.shape[1] > length
    assert int(cache.lengths.sum()) == round(0.5 * length * 30 * 3)
    context = [[p for p in positions if 4 <= p < length] for positions in kept(cache).values()]
    assert sum(own != list(range(length - len(own), length)) for own in context) > 80, "no more than recency"
