import math

import pytest
import torch
from kvpolicy_baselines.critical_kv import CriticalKVPolicy
from kvpolicy_baselines.snapkv import SnapKVPolicy
from transformers import DynamicCache

import kvpolicy
from kvpolicy import BudgetPlan, ModelSpec, PluginError, load_plan, registry, save_plan
from kvpolicy.budget.plan import PlanChoice, policy_of
from kvpolicy.testing import check_eviction_policy
from tests.plugins.direct import after_prompt, best, ids_of, kept, observed
from tests.tiny import over, tiny_model

SNAPKV = {"observation_window": 6, "recent_window": 6, "kernel_size": 1}
LENGTH = 60


def weights(ids):
    """{(layer, head): [mean over the group of the L1 norm of o_proj(value)]}, one value after the other."""
    model, cache, found = tiny_model("Llama"), DynamicCache(), {}
    with torch.no_grad():
        model(ids, **over(cache))
    for index, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        values = cache.layers[index].values[0].double()
        group = model.config.num_attention_heads // len(values)
        weight = attention.o_proj.weight.detach().double()
        for head in range(len(values)):
            own = []
            for value in values[head]:
                norms = []
                for query in range(head * group, head * group + group):
                    part = weight[:, query * len(value) : (query + 1) * len(value)]
                    norms.append(float((part @ value).abs().sum()))
                own.append(sum(norms) / group)
            found[index, head] = own
    return found


def attention_of_last(ids, count):
    """{(layer, head): [attention that the last queries pay each position]}"""
    scores = {}
    for layer, (attention, key) in enumerate(observed(ids)):
        group = len(attention) // len(key)
        for head in range(len(key)):
            scores[layer, head] = attention[head * group : (head + 1) * group, -count:].sum((0, 1)).tolist()
    return scores


@pytest.mark.parametrize(
    ("inner", "params"),
    [
        ("snapkv", {}),
        ("snapkv", SNAPKV | {"num_sink_tokens": 3}),
        ("expected_attention", {"use_value_norm": False}),
        ("tova", {}),
        ("kvzip", {}),
    ],
)
@pytest.mark.parametrize("first_stage", [0.0, 0.5, 1.0])
def test_laws(inner, params, first_stage):
    check_eviction_policy(CriticalKVPolicy(inner, params, first_stage))


@pytest.mark.parametrize("first_stage", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("allocator", ["uniform", "pyramid"])
def test_a_cache_keeps_half_by_score_and_half_by_score_times_weight(first_stage, allocator):
    ids, window, epsilon = ids_of(LENGTH), SNAPKV["recent_window"], 0.01
    policy = CriticalKVPolicy("snapkv", SNAPKV, first_stage, epsilon)
    cache = after_prompt(ids, policy, retention=0.4, allocator=allocator)
    weight, expected = weights(ids), {}
    for place, scores in attention_of_last(ids, window).items():
        capacity = int(cache.capacities[place[0], 0, place[1]])
        count = max(math.floor(capacity * first_stage), window)
        first = best(dict(enumerate(scores)), count, seen=LENGTH, recent=window)
        rest = {p: (s + epsilon) * weight[place][p] for p, s in enumerate(scores) if p not in first}
        expected[place] = sorted([*first, *best(rest, capacity - count, seen=10**6)])
    assert kept(cache) == expected
    alone = kept(after_prompt(ids, SnapKVPolicy(**SNAPKV), retention=0.4, allocator=allocator))
    assert (kept(cache) == alone) == (first_stage == 1.0)


def test_decoding_gives_up_the_second_half_first():
    ids, policy = ids_of(LENGTH), CriticalKVPolicy("snapkv", SNAPKV)
    model = tiny_model("Llama")
    cache = kvpolicy.new_cache(model, policy=policy, retention=20 / LENGTH, min_tokens=8)
    with torch.no_grad():
        model(ids, **over(cache))
    first = kept(after_prompt(ids, SnapKVPolicy(**SNAPKV), retention=10 / LENGTH))
    with torch.no_grad():
        for step in range(6):
            model(ids[:, step : step + 1], **over(cache))
    now = kept(cache)
    assert all(set(first[place]) <= set(now[place]) for place in first)
    assert all(set(range(LENGTH, LENGTH + 6)) <= set(positions) for positions in now.values())


def test_a_plan_stores_the_inner_policy(tmp_path):
    model, ids = tiny_model("Llama"), ids_of(LENGTH)
    spec = ModelSpec.from_config(model.config)
    params = {"inner": "snapkv", "inner_params": SNAPKV, "first_stage": 0.25}
    table = torch.full(spec.table_shape, 20)
    save_plan(
        BudgetPlan.from_capacities(spec, table, LENGTH, PlanChoice("critical_kv", params)), tmp_path / "plan.json"
    )
    plan = load_plan(tmp_path / "plan.json")
    assert policy_of(plan) == CriticalKVPolicy(**params)
    assert policy_of(plan).params() == params | {"epsilon": 1e-4}
    caches = [kvpolicy.new_cache(model, plan, context_length=LENGTH)]
    caches.append(kvpolicy.new_cache(model, policy=CriticalKVPolicy(**params), retention=20 / LENGTH, min_tokens=8))
    for cache in caches:
        with torch.no_grad():
            model(ids, **over(cache))
    assert kept(caches[0]) == kept(caches[1])


def test_an_allocator_that_splits_by_the_scores_is_refused():
    with pytest.raises(PluginError, match="CriticalKVPolicy requires capacity, and AdaKVAllocator splits"):
        kvpolicy.new_cache(tiny_model("Llama"), policy=CriticalKVPolicy(), allocator="adakv", retention=0.3)


@pytest.mark.parametrize(
    ("params", "error"),
    [
        ({"first_stage": 1.5}, "first_stage must lie in"),
        ({"epsilon": -1.0}, "epsilon must be a number"),
        ({"inner": "streaming"}, "'streaming' keeps the most recent entries and scores none"),
        ({"inner": "h2o"}, "'h2o' adds up its own scores"),
        ({"inner": "nobody"}, "no policy named 'nobody'"),
    ],
)
def test_bad_parameters_are_refused(params, error):
    with pytest.raises(PluginError, match=error):
        registry.create("policy", "critical_kv", params)
