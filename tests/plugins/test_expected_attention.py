import math

import pytest
import torch
from kvpolicy_baselines import expected_attention
from kvpolicy_baselines.expected_attention import ExpectedAttentionPolicy
from transformers import DynamicCache

import kvpolicy
from kvpolicy import LayerActivations, PluginError, Rotary
from kvpolicy.testing import check_eviction_policy
from tests.plugins.direct import best, ids_of, kept
from tests.tiny import over, tiny_model


def mean_rotation(model, begin, count, dim):
    """The matrix that turns a vector by the average over positions begin to begin + count, float64 [D, D]."""
    cos, sin = model.model.rotary_emb(torch.zeros(1), torch.arange(begin, begin + count)[None])
    total, half = torch.zeros(dim, dim, dtype=torch.float64), dim // 2
    for c, s in zip(cos[0].double(), sin[0].double(), strict=True):
        for i in range(half):
            total[i, i] += c[i]
            total[i, i + half] -= s[i]
            total[i + half, i] += s[i]
            total[i + half, i + half] += c[i]
    return total / count


def formula(model, ids, policy):
    """{(layer, head): [score of each position]}, from what the query projections put out, in float64."""
    projected, cache, sinks = {}, DynamicCache(), policy.num_sink_tokens
    for index, layer in enumerate(model.model.layers):
        hook = lambda _, __, out, index=index: projected.update({index: out[0]})  # noqa: E731
        layer.self_attn.q_proj.register_forward_hook(hook)
    with torch.no_grad():
        model(ids, **over(cache))
    length, scores = ids.shape[1], {}
    for index, held in enumerate(cache.layers):
        attention = model.model.layers[index].self_attn
        queries = projected[index].unflatten(-1, (-1, attention.head_dim)).double()[sinks:]  # [n, heads, D]
        turn = mean_rotation(model, length, policy.num_future_positions, attention.head_dim)
        for head in range(2):
            keys, values = held.keys[0, head].double(), held.values[0, head].double()
            total = torch.zeros(length - sinks, dtype=torch.float64)
            for query in range(head * 3, head * 3 + 3):
                sample = queries[:, query]
                mean, covariance = sample.mean(0), sample.T.cov(correction=0)
                mean, covariance = turn @ mean, turn @ covariance @ turn.T
                logits = []
                for key in keys[sinks:]:
                    logit = attention.scaling * (mean @ key)
                    if policy.use_covariance:
                        logit += attention.scaling**2 * (key @ covariance @ key) / 2
                    logits.append(float(logit))
                total += torch.tensor([math.exp(x - max(logits)) for x in logits]).div(
                    sum(math.exp(x - max(logits)) for x in logits)
                )
            expected = total / 3
            if policy.use_value_norm:
                expected = (expected + policy.epsilon) * values[sinks:].norm(dim=-1)
            scores[index, head] = [0.0] * sinks + expected.tolist()
    return scores


VARIANTS = [
    {},
    {"use_covariance": False},
    {"use_value_norm": False},
    {"epsilon": 0.05},
    {"num_future_positions": 1, "num_sink_tokens": 0},
    {"num_future_positions": 40, "num_sink_tokens": 2, "recent_window": 5},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_laws(variant):
    check_eviction_policy(ExpectedAttentionPolicy(**variant))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Llama", {}),
        ("Granite", {"attention_multiplier": 0.6}),
        (
            "Llama",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "attention_factor": 1.5}},
        ),
    ],
    ids=["plain", "scale", "yarn"],
)
def test_a_cache_keeps_the_formulas_best(name, options, variant):
    """Under yarn, cosine and sine carry a factor, by which keys and queries get longer than they are."""
    policy, ids, retention = ExpectedAttentionPolicy(**variant), ids_of(90), 0.3
    factor = options.get("rope_parameters", {}).get("attention_factor", 1.0)
    model = tiny_model(name, **options)
    assert model.model.rotary_emb.attention_scaling == factor
    scores = formula(tiny_model(name, **options), ids, policy)
    cache = kvpolicy.new_cache(model, policy=policy, retention=retention, min_tokens=8)
    with torch.no_grad():
        model(ids, **over(cache))
    expected = {}
    for (layer, head), row in scores.items():
        ranked, count = dict(enumerate(row)), int(cache.capacities[layer, 0, head])
        expected[layer, head] = best(ranked, count, seen=90, sinks=policy.num_sink_tokens, recent=policy.recent_window)
    assert kept(cache) == expected
    assert int(cache.lengths.sum()) == round(retention * 90 * 6)
    sinks = policy.num_sink_tokens
    for held in expected.values():
        assert held != [*range(sinks), *range(90 - len(held) + sinks, 90)], "no more than recency"


def test_the_default_is_found_by_name():
    policy = kvpolicy.registry.create("policy", "expected_attention", {})
    assert policy == ExpectedAttentionPolicy(512, True, True, 0.0, 4, 0)


@pytest.fixture
def given():
    """Two rows of one KV head with two query heads, keys of 4 dimensions of which two turn."""
    torch.manual_seed(0)
    rotary = Rotary(torch.tensor([0]), torch.tensor([2]), torch.tensor([0.3]))
    positions = torch.arange(12).repeat(2, 1, 1)
    return {
        "layer": 0,
        "queries": torch.randn(2, 2, 12, 4),
        "keys": torch.randn(2, 1, 12, 4),
        "values": torch.randn(2, 1, 12, 4),
        "positions": positions,
        "rotary": rotary,
        "scale": 0.5,
    }


def test_only_differences_of_positions_matter(given):
    """All places moved on, and all keys and queries turned as far: the same."""
    policy = ExpectedAttentionPolicy(num_sink_tokens=0)
    scores = policy.score_prompt(LayerActivations(**given))
    by = torch.tensor([5 * 0.3])
    moved = {name: given["rotary"].turned(given[name], by.cos(), by.sin()) for name in ("queries", "keys")}
    there = policy.score_prompt(LayerActivations(**given | moved | {"positions": given["positions"] + 5}))
    torch.testing.assert_close(scores, there)


def test_heads_at_a_time_make_no_difference(given, monkeypatch):
    """Three KV heads with two query heads each: all at once, two and one, one by one."""
    policy, wide = ExpectedAttentionPolicy(num_sink_tokens=1), given | {"queries": torch.randn(2, 6, 12, 4)}
    wide |= {name: torch.randn(2, 3, 12, 4) for name in ("keys", "values")}
    wide["positions"] = given["positions"].expand(-1, 3, -1)
    scores = policy.score_prompt(LayerActivations(**wide))
    for numbers in (2 * 192, 1):
        monkeypatch.setattr(expected_attention, "_NUMBERS", numbers)
        torch.testing.assert_close(policy.score_prompt(LayerActivations(**wide)), scores)


def test_padding_has_no_part_in_the_statistics(given):
    """Whatever it holds, and its queries."""
    alone = {name: x[1:, :, 5:] for name, x in given.items() if isinstance(x, torch.Tensor)}
    alone = given | alone | {"positions": torch.arange(7)[None, None]}
    given["positions"][1] = torch.cat([torch.full((5,), -1), torch.arange(7)])
    for name in ("queries", "keys", "values"):
        given[name] = given[name].clone()
        given[name][1, :, :5] = float("nan")
    policy = ExpectedAttentionPolicy(num_sink_tokens=2)
    scores = policy.score_prompt(LayerActivations(**given))
    torch.testing.assert_close(scores[1:, :, 5:], policy.score_prompt(LayerActivations(**alone)))
    assert bool(scores.isfinite().all())


def test_a_later_chunk_asks_its_own_queries(given):
    policy = ExpectedAttentionPolicy(num_sink_tokens=2)
    later = given | {"queries": given["queries"][:, :, -4:]}
    scores = policy.score_prompt(LayerActivations(**later))
    ignored = given | {"queries": given["queries"].clone()}
    ignored["queries"][:, :, :8] = 7.0
    assert not torch.allclose(scores, policy.score_prompt(LayerActivations(**ignored))), "all twelve were asked"
    held = torch.cat([torch.tensor([0, 1, 3, 4, 9, 20, 21, 30]), torch.arange(40, 44)])
    elsewhere = policy.score_prompt(LayerActivations(**later | {"positions": held.expand(2, 1, -1)}))
    torch.testing.assert_close(scores, elsewhere)  # where entries once were does not matter, they are turned already


@pytest.mark.parametrize("length", [1, 3, 4, 5])
def test_a_prompt_of_few_tokens(length):
    model = tiny_model("Llama")
    cache = kvpolicy.new_cache(model, policy="expected_attention", retention=0.5, min_tokens=8)
    with torch.no_grad():
        model(ids_of(length), **over(cache))
        model(ids_of(60), **over(cache))
    assert int(cache.lengths.sum()) == round(0.5 * (60 + length) * 6)
    assert all(held[:4] == [0, 1, 2, 3] for held in kept(cache).values())


def test_decoding_leaves_the_scores_and_keeps_decoded_tokens_longest():
    model = tiny_model("Llama")
    cache = kvpolicy.new_cache(model, policy="expected_attention", retention=0.3, min_tokens=8)
    with torch.no_grad():
        model(ids_of(60), **over(cache))
        before = kept(cache)
        for token in ids_of(5)[0]:
            model(token[None, None], **over(cache))
    for head, held in kept(cache).items():
        assert held[-5:] == list(range(60, 65))
        assert set(held[:-5]) < set(before[head])


@pytest.mark.parametrize("bad", [{"num_future_positions": 0}, {"epsilon": -0.1}, {"epsilon": float("nan")}])
def test_bad_parameters_are_refused(bad):
    with pytest.raises(PluginError, match=f"expected_attention: {next(iter(bad))} must"):
        ExpectedAttentionPolicy(**bad)
