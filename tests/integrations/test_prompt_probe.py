"""The loss behind a compressed prompt: equal to a cache that is compressed once and then fed token by token."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F

import kvpolicy
from kvpolicy import (
    BudgetError,
    BudgetPlan,
    EvictionPolicy,
    ModelSpec,
    PlanWarning,
    PluginError,
    PromptProbe,
    TransformersProbe,
    registry,
)
from kvpolicy.budget.plan import PlanChoice, PlanMethod
from kvpolicy.integrations.transformers.attention.attachment import is_attached
from kvpolicy.integrations.transformers.probes import prefilled
from kvpolicy.measure.evaluation import measured_bytes, probe_for
from tests.tiny import attention_of, over, tiny_ids, tiny_model
from tests.tiny_checkpoint import tiny_tokenizer

LENGTH, PROMPT = 120, 80
SNAPKV = {"observation_window": 8, "recent_window": 8}


def uneven(spec, low=10, high=PROMPT):
    """A different capacity for each head."""
    count = spec.num_budgeted_layers * spec.num_kv_heads
    return torch.linspace(low, high, count).long().view(spec.table_shape).flip(0)


def stepped_loss(model, ids, table, name, params):
    """The oracle: through `new_cache`, one token at a time, what is decoded kept on top."""
    spec, losses = ModelSpec.from_config(model.config), []
    plan = BudgetPlan.from_capacities(spec, table, PROMPT, PlanChoice(name, params))
    cache = kvpolicy.new_cache(model, plan, context_length=PROMPT, decode="append")
    with torch.no_grad():
        logits = model(ids[:, :PROMPT], **over(cache)).logits[:, -1]
        assert torch.equal(cache.lengths, table[:, None].expand(-1, len(ids), -1)), "compressed to the table"
        for position in range(PROMPT, LENGTH):
            losses.append(F.cross_entropy(logits, ids[:, position], reduction="none"))
            logits = model(ids[:, position : position + 1], **over(cache)).logits[:, -1]
    assert torch.equal(cache.lengths, (table + LENGTH - PROMPT)[:, None].expand(-1, len(ids), -1)), "nothing left since"
    kvpolicy.detach(model)
    return torch.stack(losses, 1).double().mean(1)


def dense_loss(model, ids, first=PROMPT):
    with torch.no_grad():
        logits = model(ids).logits[:, first - 1 : -1]
    return F.cross_entropy(logits.transpose(1, 2), ids[:, first:], reduction="none").double().mean(1)


def make_probe(model, ids, name="snapkv", params=SNAPKV, **more):
    return PromptProbe(model, ids, policy=registry.create("policy", name, params), prefill_length=PROMPT, **more)


# Gemma3Window keeps sliding layers in stock caches, Gemma3n has layers that reuse others' keys and values
@pytest.mark.parametrize("model_name", ["Llama", "Gemma3Window", "Gemma3n"])
@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("snapkv", SNAPKV),
        ("h2o", {"recent_window": 4}),
        ("streaming", {}),
        ("critical_kv", {"inner_params": SNAPKV}),
    ],
)
def test_the_loss_is_that_of_decoding_token_by_token(model_name, name, params):
    model, ids = tiny_model(model_name, attention=attention_of(model_name)), tiny_ids(LENGTH, batch=2)
    table = uneven(ModelSpec.from_config(model.config))
    expected = stepped_loss(model, ids, table, name, params)
    found = make_probe(model, ids, name, params).loss(table)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert (found - dense_loss(model, ids)).abs().max() > 1e-3, "eviction must have had an effect"


def test_one_table_after_another_gives_what_each_gives_alone():
    """The prompts are run once, and no table leaves a trace in them."""
    model, ids = tiny_model("Llama"), tiny_ids(LENGTH, batch=3)
    spec = ModelSpec.from_config(model.config)
    tables = [uneven(spec), torch.full(spec.table_shape, 12), uneven(spec, 70, 9)]
    probe = make_probe(model, ids, batch_size=2)
    for table in (*tables, tables[0]):
        alone = make_probe(model, ids).loss(table)
        torch.testing.assert_close(probe.loss(table), alone, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["snapkv", "h2o"])
def test_a_full_budget_gives_the_dense_loss(name):
    model, ids = tiny_model("Llama"), tiny_ids(LENGTH, batch=2)
    probe = make_probe(model, ids, name, {})
    torch.testing.assert_close(probe.full_loss(), dense_loss(model, ids), rtol=1e-6, atol=0)


def test_the_prompt_is_half_of_a_sequence_where_nothing_else_is_said():
    probe = PromptProbe(tiny_model("Llama"), tiny_ids(LENGTH), policy=registry.create("policy", "h2o"))
    assert (probe.prefill_length, probe.context_length, probe.first_scored) == (60, 60, 60)
    assert next(probe.token_losses(torch.full((3, 2), 30))).shape == (1, 60)


def forwards_of(model):
    """A list that grows by the tokens of each forward."""
    lengths = []
    model.register_forward_pre_hook(lambda _, args, given: lengths.append(args[0].shape[1]), with_kwargs=True)
    return lengths


@pytest.mark.parametrize(("kept_bytes", "prompts"), [(10**9, [2, 0]), (0, [2, 2]), (60_000, [2, 1])])
def test_prompts_are_run_once_as_far_as_memory_reaches(monkeypatch, kept_bytes, prompts):
    monkeypatch.setattr(prefilled, "KEPT_BYTES", kept_bytes)
    model, ids = tiny_model("Llama", layers=2), tiny_ids(LENGTH, batch=2)
    probe, seen, losses = make_probe(model, ids), forwards_of(model), []
    for count in prompts:
        seen.clear()
        losses.append(probe.loss(torch.full((2, 2), 20)))
        assert (seen.count(PROMPT), seen.count(LENGTH - PROMPT - 1)) == (count, 2)
    assert torch.equal(*losses)
    assert probe.contexts.nbytes <= kept_bytes


@pytest.mark.parametrize(("kept_bytes", "prompts", "behind"), [(10**9, 5, 2), (0, 3, 2), (60_000, 4, 4)])
def test_the_time_of_a_sequence_is_not_measured_on_all_of_them(monkeypatch, kept_bytes, prompts, behind):
    """Each prompt that is run once, and two batches of each kind; the last figure keeps one prompt of five."""
    monkeypatch.setattr(prefilled, "KEPT_BYTES", kept_bytes)
    model = tiny_model("Llama", layers=2)
    probe, seen = make_probe(model, tiny_ids(LENGTH, batch=5)), forwards_of(model)
    assert probe.seconds(1e9) < 1e6
    assert (seen.count(PROMPT), seen.count(LENGTH - PROMPT - 1)) == (prompts, behind)
    window = probe_for(registry.create("policy", "streaming"), model, tiny_ids(LENGTH))
    assert window.seconds(0.25) == 0.25


def test_the_model_is_left_as_it_was():
    model, ids = tiny_model("Llama"), tiny_ids(LENGTH)
    plain = model(ids).logits
    probe = make_probe(model, ids)
    probe.loss(torch.full((3, 2), 20))
    probe.filled(torch.full((3, 2), 20))
    assert not is_attached(model)
    assert torch.equal(plain, model(ids).logits)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_bytes_are_those_of_one_compressed_prompt(batch_size):
    model, ids = tiny_model("Llama"), tiny_ids(LENGTH, batch=2)
    table = uneven(ModelSpec.from_config(model.config))
    held = measured_bytes(make_probe(model, ids, batch_size=batch_size), table)
    assert held.entries == int(table.sum())
    assert held.dense_bytes == 3 * 2 * PROMPT * (16 + 16) * 4
    entry = (16 + 16) * 4 + 4 + 4  # key and value, position, score
    assert held.entries * entry < held.bytes < held.entries * entry + 3 * 1000


def test_the_probe_of_a_policy():
    model, ids = tiny_model("Llama"), tiny_ids(LENGTH)
    window = probe_for(registry.create("policy", "streaming"), model, ids)
    assert type(window) is TransformersProbe and (window.protocol, window.prefill_length) == ("window", 0)
    prompt = probe_for(registry.create("policy", "snapkv"), model, ids, prefill_length=90)
    assert type(prompt) is PromptProbe and (prompt.protocol, prompt.prefill_length) == ("prompt", 90)
    assert "a prompt of 90 tokens" in prompt.described and "the 30 tokens behind it" in prompt.described


@pytest.mark.parametrize("by", ["adakv", "cake"])
@pytest.mark.parametrize(("name", "params"), [("snapkv", SNAPKV), ("streaming", {})])
def test_an_allocator_at_run_time_splits_the_total_for_each_prompt(name, params, by):
    model, ids = tiny_model("Llama"), tiny_ids(LENGTH, batch=2)
    policy, allocator = registry.create("policy", name, params), registry.create("allocator", by)
    cache = kvpolicy.new_cache(
        model, retention=0.3, policy=policy, allocator=allocator, context_length=PROMPT, decode="append"
    )
    losses = []
    with torch.no_grad():
        logits = model(ids[:, :PROMPT], **over(cache)).logits[:, -1]
        for position in range(PROMPT, LENGTH):
            losses.append(F.cross_entropy(logits, ids[:, position], reduction="none"))
            logits = model(ids[:, position : position + 1], **over(cache)).logits[:, -1]
    kvpolicy.detach(model)
    table = torch.full((3, 2), 24)  # 0.3 of 80
    probe = PromptProbe(model, ids, policy=policy, prefill_length=PROMPT, allocator=allocator)
    torch.testing.assert_close(probe.loss(table), torch.stack(losses, 1).double().mean(1), rtol=1e-5, atol=0)
    assert measured_bytes(probe, table).entries == int(table.sum())
    if name == "snapkv":
        uniform = make_probe(model, ids).loss(table)
        assert (probe.loss(table) - uniform).abs().max() > 1e-4, "the split must have had an effect"


def test_an_allocator_that_splits_nothing_is_refused():
    with pytest.raises(BudgetError, match="PyramidAllocator does not split at run time: make a table of its shares"):
        make_probe(tiny_model("Llama"), tiny_ids(LENGTH), allocator=registry.create("allocator", "pyramid"))


@pytest.mark.parametrize("length", [0, LENGTH - 1, LENGTH])
def test_a_prompt_that_leaves_nothing_to_score_is_refused(length):
    with pytest.raises(BudgetError, match=rf"from 1 to 118 of a sequence's 120 tokens.* got {length}"):
        PromptProbe(
            tiny_model("Llama"), tiny_ids(LENGTH), policy=registry.create("policy", "h2o"), prefill_length=length
        )


def test_tables_that_cannot_be_are_refused():
    probe = make_probe(tiny_model("Llama"), tiny_ids(LENGTH), "h2o", {"num_sink_tokens": 4})
    with pytest.raises(BudgetError, match=r"shape \(2, 2\), this model has .* \(3, 2\)"):
        probe.loss(torch.full((2, 2), 9))
    with pytest.raises(BudgetError, match="more than the 4 sink tokens, got a capacity of 4"):
        probe.loss(torch.full((3, 2), 4))


def test_a_policy_that_requires_what_no_cache_has_is_refused_before_anything_runs():
    class Asking(type(registry.create("policy", "l2norm"))):
        requires = frozenset({"output"})

    model = tiny_model("Llama")
    model.register_forward_pre_hook(lambda *_: pytest.fail("ran"))
    with pytest.raises(PluginError, match="requires output, which this cache cannot supply"):
        PromptProbe(model, tiny_ids(LENGTH), policy=Asking())


def test_a_policy_that_has_the_context_repeated():
    """Against a cache whose context is repeated once and that is then fed token by token."""
    model, tokenizer, ids = tiny_model("Llama", vocab_size=400), tiny_tokenizer(), tiny_ids(LENGTH, batch=2)
    policy = registry.create("policy", "kvzip", {"repeat_chunk": 50})
    with pytest.raises(PluginError, match="KVzipPolicy requires repeat_attention: prompts are repeated, which takes"):
        PromptProbe(model, ids, policy=policy)
    probe = PromptProbe(model, ids, policy=policy, prefill_length=PROMPT, tokenizer=tokenizer)
    table, losses = uneven(probe.spec), []
    plan = BudgetPlan.from_capacities(probe.spec, table, PROMPT, PlanChoice("kvzip", {"repeat_chunk": 50}))
    cache = kvpolicy.new_cache(model, plan, context_length=PROMPT, decode="append")
    with torch.no_grad():
        logits = model(ids[:, :PROMPT], **over(cache)).logits[:, -1]
        kvpolicy.repeat_context(model, cache, ids[:, :PROMPT], tokenizer)
        for position in range(PROMPT, LENGTH):
            losses.append(F.cross_entropy(logits, ids[:, position], reduction="none"))
            logits = model(ids[:, position : position + 1], **over(cache)).logits[:, -1]
    kvpolicy.detach(model)
    expected = torch.stack(losses, 1).double().mean(1)
    torch.testing.assert_close(probe.loss(table), expected, rtol=1e-5, atol=0)
    soft = probe.soft_loss(hard(table, 4), "text").double()
    torch.testing.assert_close(soft, expected, rtol=1e-5, atol=0)
    assert (expected - dense_loss(model, ids)).abs().max() > 1e-3, "eviction must have had an effect"


# --- a plan under another policy


def tuned_plan(model, name="streaming", params=None):
    spec = ModelSpec.from_config(model.config)
    own = BudgetPlan.from_capacities(spec, uneven(spec, 20), PROMPT)
    method = PlanMethod(None, PlanChoice("uniform"), PlanChoice(name, params or {}))
    return BudgetPlan(own.model, method, None, own.levels, own.provenance)


@pytest.mark.parametrize(
    ("tuned", "params", "used"),
    [
        ("streaming", {"num_sink_tokens": 4}, "snapkv"),
        ("snapkv", {"kernel_size": 7}, "snapkv"),
        ("gone", {}, "h2o"),
    ],
    ids=["another", "other parameters", "one that is not installed"],
)
def test_a_plan_under_another_policy_than_it_was_tuned_for_warns(tuned, params, used):
    model = tiny_model("Llama")
    plan = tuned_plan(model, tuned, params)
    with pytest.warns(PlanWarning, match=f"tuned for the policy '{tuned}'.* evicts here") as caught:
        kvpolicy.new_cache(model, plan, policy=used)
    assert len(caught) == 1 and "\n" not in str(caught[0].message)
    assert caught[0].filename == __file__


def test_a_plan_under_its_own_policy_and_a_table_of_ones_own_do_not_warn():
    model = tiny_model("Llama")
    plan = tuned_plan(model, "snapkv", SNAPKV)
    kvpolicy.new_cache(model, plan)  # pytest turns a warning into an error
    kvpolicy.new_cache(model, plan, policy=registry.create("policy", "snapkv", SNAPKV))
    own = BudgetPlan.from_capacities(ModelSpec.from_config(model.config), torch.full((3, 2), 20), PROMPT)
    kvpolicy.new_cache(model, own, policy="snapkv")


def hard(table, num_sink_tokens):
    def bias(layer, rank):
        visible = rank < (table[layer] - num_sink_tokens)[:, None, None]
        return torch.zeros(visible.shape).masked_fill(~visible, float("-inf"))

    return bias


@pytest.mark.parametrize("model_name", ["Llama", "GptOss", "Gemma3Window", "Gemma3n"])
@pytest.mark.parametrize(
    ("name", "params"),
    [("snapkv", SNAPKV), ("snapkv", SNAPKV | {"num_sink_tokens": 3}), ("h2o", {}), ("streaming", {})],
)
def test_a_hard_bias_by_rank_is_the_policy(model_name, name, params):
    model, ids = tiny_model(model_name, attention=attention_of(model_name)), tiny_ids(LENGTH, batch=3)
    probe = make_probe(model, ids, name, params, batch_size=2)
    table = uneven(probe.spec)
    found = probe.soft_loss(hard(table, probe.num_sink_tokens), "text").double()
    torch.testing.assert_close(found, probe.loss(table), rtol=1e-5, atol=0)
    assert (found - probe.full_loss()).abs().max() > 1e-3, "eviction must have had an effect"


def test_without_a_bias_nothing_diverges_and_gradients_reach_every_head():
    model, ids = tiny_model("Llama"), tiny_ids(LENGTH, batch=2)
    probe = make_probe(model, ids)
    none = probe.soft_loss(lambda layer, rank: torch.zeros(rank.shape))
    torch.testing.assert_close(none, torch.zeros(2), rtol=0, atol=1e-6)
    theta = torch.zeros(probe.spec.table_shape, requires_grad=True)
    probe.soft_loss(
        lambda layer, rank: theta[layer][:, None, None] * rank.clamp(min=0) / 50 - rank / 50
    ).sum().backward()
    assert (theta.grad != 0).all()


@dataclass(frozen=True, slots=True)
class Alternating(EvictionPolicy):
    """Keeps every other token where half of them fit, and the most recent where fewer do."""

    requires: ClassVar[frozenset[str]] = frozenset({"capacity", "positions"})
    num_sink_tokens: int = 4

    def score_prompt(self, activations):
        places = activations.positions.float()
        fits = activations.capacity[..., None] * 2 >= places.shape[2]
        return places + 1000 * (fits & (activations.positions % 2 == 0))


def test_a_policy_that_knows_its_capacity_scores_each_table_again():
    model, ids = tiny_model("Llama"), tiny_ids(LENGTH)
    probe, alone = (PromptProbe(model, ids, policy=Alternating(), prefill_length=PROMPT) for _ in range(2))
    small, large = (torch.full(probe.spec.table_shape, size) for size in (20, 40))
    losses = [probe.loss(table) for table in (large, small, large)]
    torch.testing.assert_close(losses[1], alone.loss(small), rtol=1e-6, atol=0)
    torch.testing.assert_close(losses[0], losses[2], rtol=1e-6, atol=0)
    kept = [sorted(probe.filled(table).positions(0)[0].tolist()) for table in (small, large)]
    assert kept == [[*range(4), *range(64, 80)], sorted({*range(4), *range(8, 80, 2)})]
    with pytest.raises(PluginError, match="all capacities, and Alternating requires capacity"):
        probe.soft_loss(hard(uneven(probe.spec), 0))


def test_a_split_of_each_prompt_has_no_soft_loss():
    model, ids = tiny_model("Llama"), tiny_ids(LENGTH)
    probe = make_probe(model, ids, allocator=registry.create("allocator", "adakv"))
    with pytest.raises(PluginError, match="AdaKVAllocator splits the budget of each prompt"):
        probe.soft_loss(hard(uneven(probe.spec), 0))
