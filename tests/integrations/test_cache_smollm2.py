"""The cache on a real model: logits, bytes, growth, and the loss that the search measured."""

import gc
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from transformers import DynamicCache

import kvpolicy
from kvpolicy import BudgetPlan, EvictionPolicy, Importance, ModelSpec, TransformersProbe
from kvpolicy.budget.plan import PlanChoice, PlanLevel, PlanMethod, PlanModel
from tests.integrations.ragged_oracle import masked_logits, ragged_table, stepped_logits, visible_tokens
from tests.tiny import over, tiny_model

SINKS = 4
TEXT = "A cache keeps what its budget allows; each head keeps another part of what was said. " * 60


@dataclass(frozen=True, slots=True)
class ValueNorm(EvictionPolicy):
    """Keeps the entries with the largest values."""

    requires: ClassVar[frozenset[str]] = frozenset({"values"})
    num_sink_tokens: int = SINKS

    def score_prompt(self, activations):
        return activations.values.norm(dim=-1).float()


def ragged_plan(spec, retentions=(0.1, 0.3, 0.5), context_length=256, seed=0):
    """Levels whose shares differ between the heads by a factor of up to 9."""
    shape = spec.table_shape
    weight = 1 + 8 * torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    levels = []
    for retention in retentions:
        low, high = 0.0, 1.0 / retention
        for _ in range(60):  # the factor at which clipped shares have the right mean
            middle = (low + high) / 2
            mean = (weight * retention * middle).clamp(max=1).mean()
            low, high = (middle, high) if mean < retention else (low, middle)
        levels.append(PlanLevel(retention, (weight * retention * low).clamp(max=1)))
    policy = PlanChoice("streaming", {"num_sink_tokens": SINKS})
    return BudgetPlan(
        PlanModel.from_spec(spec),
        PlanMethod(None, None, policy),
        Importance(torch.ones(shape)),
        tuple(levels),
        {"context_length": context_length},
    )


@pytest.fixture
def model(smollm2):
    yield smollm2[0]
    kvpolicy.detach(smollm2[0])


@pytest.fixture(scope="module")
def ids(smollm2):
    return smollm2[1](TEXT, return_tensors="pt").input_ids


STEPS = [200, 30] + [1] * 20 + [15] + [1] * 5


def test_a_full_budget_equals_the_stock_cache(model, ids):
    tokens = ids[:, : sum(STEPS)]
    expected = stepped_logits(model, tokens, DynamicCache(config=model.config), STEPS)
    got = stepped_logits(model, tokens, kvpolicy.new_cache(model, retention=1.0), STEPS)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("steps", [STEPS, [64] * 3 + [1] * 12], ids=["second turn", "chunked prefill"])
def test_a_ragged_budget_equals_a_mask_per_head(model, ids, steps):
    spec = ModelSpec.from_config(model.config)
    table = ragged_table(spec, SINKS + 1, 120)
    tokens = ids[:, : sum(steps)]
    expected = masked_logits(model, tokens, visible_tokens(table, SINKS, steps))
    cache = kvpolicy.new_cache(model, BudgetPlan.from_capacities(spec, table, 256), context_length=256)
    got = stepped_logits(model, tokens, cache, steps)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert torch.equal(cache.lengths[:, 0], table)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("retention", "policy"),
    [
        (0.3, "streaming"),
        (0.1, "value norm"),
        *(pytest.param(*case, marks=SLOW) for case in [(0.5, "streaming"), (0.1, "streaming")]),
        *(pytest.param(*case, marks=SLOW) for case in [(0.5, "value norm"), (0.3, "value norm")]),
    ],
)
def test_bytes_are_those_of_the_entries_kept(model, ids, retention, policy):
    spec, length = ModelSpec.from_config(model.config), 1000
    chosen = None if policy == "streaming" else ValueNorm()
    plan = ragged_plan(spec, context_length=length)
    cache = kvpolicy.new_cache(model, plan, retention=retention, min_tokens=32, policy=chosen)
    stepped_logits(model, ids[:, :length], cache, [length])
    kept = int(cache.lengths.sum())
    entries = kept * 2 * spec.head_dim * 4
    tables = cache.nbytes - sum(x.keys.nbytes + x.values.nbytes for x in (held.arena for held in cache.store.layers))
    assert kept == round(retention * length * spec.num_budgeted_layers * spec.num_kv_heads)
    assert cache.nbytes <= 1.05 * entries + tables
    assert tables <= (0.02 if chosen is None else 0.035) * entries / 2, "of the entries' bytes in bf16"
    assert cache.nbytes <= 1.02 * storage_bytes(cache)
    assert storage_bytes(cache) <= 1.02 * cache.nbytes


def storage_bytes(cache):
    """Bytes of the distinct storages behind every tensor that the cache refers to, found by the garbage collector."""
    found, todo, storages = set(), [cache], {}
    while todo:
        item = todo.pop()
        if id(item) in found or isinstance(item, type | torch.nn.Module):
            continue
        found.add(id(item))
        if isinstance(item, torch.Tensor):
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, list | tuple | dict | set) or type(item).__module__.split(".")[0] in (
            "kvpolicy",
            "transformers",
        ):
            todo += gc.get_referents(item)
    return sum(storages.values())


@pytest.mark.slow
def test_no_head_exceeds_its_capacity_in_200_steps(model, ids):
    cache = kvpolicy.new_cache(model, ragged_plan(ModelSpec.from_config(model.config)), retention=0.3, min_tokens=32)
    before = torch.zeros(1)
    with torch.no_grad():
        model(ids[:, :150], **over(cache), logits_to_keep=1)
        for step in range(200):
            model(ids[:, 150 + step : 151 + step], **over(cache))
            assert bool((cache.lengths <= cache.capacities).all())
            assert bool((cache.capacities >= before).all()), "a capacity fell"
            before = cache.capacities
    assert torch.equal(cache.lengths, cache.capacities) or int((cache.capacities - cache.lengths).max()) < 64


def test_a_budget_grows_with_a_long_answer():
    model = tiny_model("Llama", max_position_embeddings=2048)
    spec = ModelSpec.from_config(model.config)
    prompt = torch.arange(3, 19)[None]
    mask = torch.ones_like(prompt)
    options = {"max_new_tokens": 1500, "do_sample": True, "eos_token_id": None}
    cache = kvpolicy.new_cache(model, ragged_plan(spec, context_length=1024), retention=0.3)
    torch.manual_seed(0)
    got = model.generate(prompt, attention_mask=mask, **over(cache), **options)
    torch.manual_seed(0)
    dense = model.generate(prompt, attention_mask=mask, **{**options, "max_new_tokens": 64})
    assert torch.equal(got[:, : 16 + 64], dense)
    seen = cache.get_seq_length() * spec.num_budgeted_layers * spec.num_kv_heads
    assert 0.29 <= int(cache.lengths.sum()) / seen <= 0.31


def token_by_token_loss(model, ids, cache, first):
    """Mean loss of the tokens from `first` on, each predicted with what the cache held."""
    logits = stepped_logits(model, ids, cache, [1] * ids.shape[1])
    return torch.nn.functional.cross_entropy(logits[0, first - 1 : -1], ids[0, first:])


@pytest.mark.slow
@pytest.mark.parametrize("retention", [0.5, 0.3, 0.1])
def test_the_loss_through_the_cache_is_the_loss_of_the_search(model, ids, retention):
    length = 160
    plan = ragged_plan(ModelSpec.from_config(model.config), context_length=length)
    tokens = ids[:, :length]
    probe = TransformersProbe(model, tokens, num_sink_tokens=SINKS)
    expected = probe.loss(plan.capacities(length, retention))
    cache = kvpolicy.new_cache(model, plan, retention=retention, context_length=length)
    got = token_by_token_loss(model, tokens, cache, probe.first_scored)
    assert abs(float(got.exp() / expected[0].exp()) - 1) < 1e-3
    full = probe.full_loss()
    assert retention == 0.5 or float(expected[0] - full[0]) > 1e-3, "a budget that binds"
