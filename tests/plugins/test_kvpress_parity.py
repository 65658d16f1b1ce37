"""The entries that kvpress keeps of the same prompts, as `benchmarks/kvpress_parity.py` wrote them down.

One forward for each policy: every other KV head keeps half of the entries, the rest keep 30 %.
"""

import functools
import itertools
import json
from pathlib import Path

import pytest
import torch

import kvpolicy
from kvpolicy import BudgetPlan, ModelSpec, registry
from tests.tiny import over

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "kvpress_parity.json"
KVPRESS = json.loads(RESULT.read_text(encoding="utf-8"))
PROMPTS = list(KVPRESS["prompts"])
TOKENS = torch.tensor(list(KVPRESS["prompts"].values()))
RETENTIONS = (0.5, 0.3)
LAYERS, HEADS = 30, 3
POLICIES = {
    "snapkv": {},
    "tova": {},
    "l2norm": {"num_skipped_layers": 0},  # KnormPress skips none
    "keydiff": {},
    "expected_attention": {},
    "streaming": {},
}
SAME = 0.99  # mean Jaccard; what may be missing is rounding, under another release of torch or on another CPU


@functools.cache
def by_kvpress(name, retention):
    """{(prompt, layer, head): positions}"""
    runs = [run for run in KVPRESS["runs"] if (run["policy"], run["retention"]) == (name, retention)]
    return {
        (run["prompt"], layer, head): of_bits(int(bits, 16))
        for run in runs
        for layer, heads in enumerate(run["kept"])
        for head, bits in enumerate(heads)
    }


def of_bits(bits):
    return {position for position in range(bits.bit_length()) if bits >> position & 1}


def retention_of(layer, head):
    return RETENTIONS[(layer + head) % 2]


def expected_of(name):
    """The same as the cache is asked for here."""
    tables = {retention: by_kvpress(name, retention) for retention in RETENTIONS}
    return {key: tables[retention_of(*key[1:])][key] for key in tables[RETENTIONS[0]]}


@pytest.fixture(scope="module")
def kept_by(smollm2):
    """kept_by(policy): the positions that our cache holds after the prompts."""
    model, spec, length = smollm2[0], ModelSpec.from_config(smollm2[0].config), TOKENS.shape[1]
    table = [[int(length * retention_of(layer, head)) for head in range(HEADS)] for layer in range(LAYERS)]
    plan = BudgetPlan.from_capacities(spec, table, length)

    @functools.cache
    def keep(policy):
        cache = kvpolicy.new_cache(model, plan, context_length=length, policy=policy)
        with torch.no_grad():
            model(TOKENS, **over(cache), logits_to_keep=1)
        segments = list(itertools.product(PROMPTS, range(HEADS)))
        return {
            (prompt, layer, head): set(positions.tolist())
            for layer in range(LAYERS)
            for (prompt, head), positions in zip(segments, cache.store.positions(layer), strict=True)
        }

    yield keep
    kvpolicy.detach(model)


def jaccard(ours, theirs):
    """Entries of both over entries of either, for each prompt and KV head; float64."""
    assert set(ours) == set(theirs)
    return torch.tensor([len(ours[k] & theirs[k]) / len(ours[k] | theirs[k]) for k in ours], dtype=torch.float64)


def shown(found):
    print(f"Jaccard: mean {found.mean():.4f}, min {found.min():.4f}; equal {int((found == 1).sum())} of {len(found)}")
    return found


@pytest.mark.parametrize("name", POLICIES)
def test_the_policy_keeps_what_the_press_keeps(kept_by, name):
    policy = registry.create("policy", name, POLICIES[name])
    assert shown(jaccard(kept_by(policy), expected_of(name))).mean() >= SAME


def test_l2norm_differs_among_equal_tokens_alone(kept_by):
    """In the first layer their keys are equally long, up to rounding: which of them go is for ties to say."""
    ours, theirs = kept_by(registry.create("policy", "l2norm", POLICIES["l2norm"])), expected_of("l2norm")
    for key in itertools.product(PROMPTS, [0], range(HEADS)):
        tokens = KVPRESS["prompts"][key[0]]
        assert sorted(tokens[p] for p in ours[key]) == sorted(tokens[p] for p in theirs[key])


@pytest.mark.parametrize("retention", RETENTIONS)
def test_the_presses_keep_what_they_should_and_differ(retention):
    """Else their agreement with the policies would say nothing."""
    kept = {name: by_kvpress(name, retention) for name in POLICIES}
    for held in kept.values():
        assert len(held) == len(PROMPTS) * LAYERS * HEADS
        assert {len(positions) for positions in held.values()} == {int(TOKENS.shape[1] * retention)}
    for one, other in itertools.combinations(POLICIES, 2):
        assert jaccard(kept[one], kept[other]).mean() < 0.7, (one, other)


def test_the_result_names_its_versions_and_is_small():
    assert KVPRESS["versions"]["kvpress"] == "0.5.5"
    assert {"transformers", "torch", "tokenizers"} < set(KVPRESS["versions"])
    assert RESULT.stat().st_size < 300_000
