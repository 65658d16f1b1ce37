import pytest
import torch
from kvpolicy_baselines.kv_compress import KVCompressAllocator, KVCompressPolicy
from kvpolicy_baselines.l2norm import L2NormPolicy

import kvpolicy
from kvpolicy import Budget, PluginError, apportion
from kvpolicy.testing import check_allocator, check_eviction_policy
from tests.plugins.direct import (
    after_prompt,
    assert_decodes_like,
    assert_keeps_the_best,
    best,
    ids_of,
    kept,
    observed,
    softmax,
)
from tests.tiny import over, tiny_model

INF = float("inf")
SMALL = KVCompressPolicy(observation_window=4, recent_window=4)


def pooled(mass, kernel):
    reach = kernel // 2
    return [max(mass[max(0, p - reach) : p + reach + 1]) for p in range(len(mass))]


def formula(window=8, kernel=7, power=2):
    def scores(layer, head, attention, key):
        rows = attention[:, -window:].double().tolist()
        mass = [sum(row[p] ** power for heads in rows for row in heads) for p in range(len(key))]
        return pooled(mass, kernel)

    return scores


@pytest.mark.parametrize("policy", [KVCompressPolicy(), SMALL, KVCompressPolicy(attention_power=1, kernel_size=1)])
def test_laws_of_the_policy(policy):
    check_eviction_policy(policy)


def test_the_defaults_keep_the_formulas_best_and_the_window():
    assert_keeps_the_best("kv_compress", formula(), length=160, retention=0.3, recent=8)


@pytest.mark.parametrize(("window", "kernel", "power"), [(4, 1, 2), (4, 5, 2), (8, 3, 1), (2, 1, 0.5)])
def test_parameters(window, kernel, power):
    policy = KVCompressPolicy(power, kernel, observation_window=window, recent_window=4)
    assert_keeps_the_best(policy, formula(window, kernel, power), recent=4)


def test_squares_keep_what_sums_would_not():
    one, two = (after_prompt(ids_of(160), KVCompressPolicy(attention_power=power), retention=0.3) for power in (1, 2))
    assert kept(one) != kept(two)


def test_decoding_adds_squares():
    def prompt(queries, keys):
        mass = [0.0] * len(keys)
        for rows in queries:
            for position in range(len(keys) - 4, len(keys)):
                for other, weight in enumerate(softmax(rows[position], keys[: position + 1])):
                    mass[other] += weight**2
        return pooled(mass, 7)

    def step(scores, queries, keys):
        added = dict.fromkeys(keys, 0.0)
        for query in queries:
            for position, weight in zip(keys, softmax(query, list(keys.values())), strict=True):
                added[position] += weight**2
        return {position: scores[position] + added[position] for position in keys}

    assert_decodes_like(SMALL, prompt, step, new=0.0, recent=4)


@pytest.mark.parametrize("bad", [{"attention_power": 0}, {"kernel_size": 2}, {"observation_window": 0}])
def test_bad_parameters_are_refused(bad):
    with pytest.raises(PluginError, match=f"kv_compress: {next(iter(bad))} must"):
        KVCompressPolicy(**bad)


# --- the allocator


def best_of_all(scores, total, floor):
    """How many entries each (layer, head) keeps, in loops. scores: `{(layer, head): list}`, inf for what stays."""
    counts, rest = {}, []
    for head, row in scores.items():
        row = sorted((s for s in row if s > -INF), reverse=True)
        counts[head] = max(sum(s == INF for s in row), min(floor, len(row)))
        rest += [(s, head) for s in row[counts[head] :]]
    for _, head in sorted(rest, reverse=True)[: total - sum(counts.values())]:
        counts[head] += 1
    return counts


def test_laws_of_the_allocator():
    check_allocator(KVCompressAllocator)


def test_by_hand():
    first = torch.tensor([[[INF, 9, 8, 7, 1.5], [INF, 6, 2, 1, -INF]]])
    second = torch.tensor([[[INF, 5], [INF, -3]]])
    # 9 entries: four stay, then 9, 8, 7, 6, 5
    split = KVCompressAllocator().split([first, second], Budget(9, (2, 2), 1, 5))
    assert split.tolist() == [[[4, 2], [2, 1]]]
    # a floor of 2 makes 9, 6, 5 and -3 certain as well: one is left, and 8 is the best of the others
    split = KVCompressAllocator().split([first, second], Budget(9, (2, 2), 2, 5))
    assert split.tolist() == [[[3, 2], [2, 2]]]


@pytest.mark.parametrize("floor", [1, 6])
def test_split_equals_loops_in_each_row(floor):
    generator = torch.Generator().manual_seed(floor)
    layers = [torch.rand(3, 4, n, generator=generator) ** (layer + 1) for layer, n in enumerate((50, 31, 40))]
    for layer in layers:
        layer[:, :, :2] = layer[1, :, -5:] = INF
    layers[1][0, 2, 10:] = -INF
    budget = Budget(150, (3, 4), floor, 50)
    split = KVCompressAllocator().split(layers, budget)
    for row in range(3):
        scores = {(i, h): layer[row, h].tolist() for i, layer in enumerate(layers) for h in range(4)}
        expected = best_of_all(scores, 150, floor)
        assert {head: split[row][head].item() for head in expected} == expected
        assert apportion(split[row], budget).tolist() == split[row].tolist(), "whole entries of the exact total"


def test_ties_are_shared():
    scores = [torch.tensor([[[3.0, 1, 1, 1], [1, 1, -INF, -INF]]])]
    assert KVCompressAllocator().split(scores, Budget(3, (1, 2), 0, 4)).tolist() == [[[1 + 2 * 3 / 5, 2 * 2 / 5]]]


def test_nothing_to_compare_is_split_evenly():
    for scores in (torch.full((1, 2, 3), -INF), torch.full((1, 2, 3), INF)):
        split = KVCompressAllocator().split([scores, scores], Budget(4, (2, 2), 1, 3))
        assert len(split.unique()) == 1 and bool((split > 0).all())


@pytest.mark.parametrize(
    ("policy", "recent", "of"),
    [
        (KVCompressPolicy(), 8, formula()),
        (L2NormPolicy(num_skipped_layers=0), 0, lambda *given: [-float(k.double().norm()) for k in given[-1]]),
    ],
    ids=["kv_compress", "l2norm"],
)
def test_a_cache_keeps_the_best_of_the_whole_model(policy, recent, of):
    length, retention = 160, 0.3
    cache = after_prompt(ids_of(length), policy, retention=retention, allocator="kv_compress")
    scores = {}
    for layer, (attention, key) in enumerate(observed(ids_of(length))):
        for head in range(2):
            scores[layer, head] = of(layer, head, attention[head * 3 : head * 3 + 3], key[head])
    total = round(retention * length * 6)
    counts = best_of_all({head: row[: length - recent] + [INF] * recent for head, row in scores.items()}, total, 1)
    assert {head: int(cache.capacities[head[0], 0, head[1]]) for head in counts} == counts
    assert kept(cache) == {
        head: best(dict(enumerate(row)), counts[head], seen=length, recent=recent) for head, row in scores.items()
    }
    layers = cache.lengths[:, 0].sum(1)
    assert int(layers.sum()) == total and int(layers.max() - layers.min()) > 4, "layers differ, the total is exact"


def test_chunks_and_decoding_keep_the_total_exact():
    model = tiny_model("Llama")
    cache = kvpolicy.new_cache(model, policy="kv_compress", allocator="kv_compress", retention=0.4, min_tokens=8)
    with torch.no_grad():
        for seen, ids in ((120, ids_of(120)), (150, ids_of(30))):
            model(ids, **over(cache))
            assert int(cache.lengths.sum()) == int(cache.capacities.sum()) == round(0.4 * seen * 6)
        before = cache.capacities
        for token in ids_of(70)[0]:
            model(token[None, None], **over(cache))
    assert bool((cache.capacities >= before).all())
    assert bool((cache.lengths <= cache.capacities).all())
    assert int(cache.capacities.sum()) == round(0.4 * (150 + 64) * 6)
