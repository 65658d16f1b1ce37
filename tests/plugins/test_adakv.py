import pytest
import torch
from kvpolicy_baselines.adakv import AdaKVAllocator
from kvpolicy_baselines.l2norm import L2NormPolicy
from kvpolicy_baselines.snapkv import SnapKVPolicy

from kvpolicy import Budget, PluginError, apportion
from kvpolicy.testing import check_allocator
from tests.plugins.direct import after_prompt, best, ids_of, kept, observed
from tests.plugins.test_snapkv import formula

INF = float("inf")


def in_loops(scores, total, safeguard):
    """Entries of each head. scores: for each head a list; inf stays anyhow, -inf is not there."""
    staying = [sum(s == INF for s in head) for head in scores]
    free = total - sum(staying)
    every = sorted(((s, h) for h, head in enumerate(scores) for s in head if abs(s) < INF), reverse=True)
    top = [h for _, h in every[:free]]
    return [staying[h] + top.count(h) * (1 - safeguard) + safeguard * free / len(scores) for h in range(len(scores))]


def test_laws():
    check_allocator(AdaKVAllocator)
    check_allocator(AdaKVAllocator(safeguard=0))
    check_allocator(AdaKVAllocator(safeguard=1))


def test_by_hand():
    scores = torch.tensor([[[INF, 9, 8, 7, 1], [INF, 6, 2, 1, -INF]]])
    budget = Budget(6, (1, 2), 1, 5)
    # 4 free: 9, 8, 7 and 6, so three for one head and one for the other; a quarter of the 4 is split evenly
    split = AdaKVAllocator(safeguard=0.25).split([scores], budget)
    assert split.tolist() == [[[1 + 0.75 * 3 + 0.5, 1 + 0.75 * 1 + 0.5]]]


@pytest.mark.parametrize("safeguard", [0.0, 0.2, 0.5, 1.0])
def test_split_equals_loops_in_each_row(safeguard):
    scores = torch.rand(3, 4, 50) * torch.tensor([1.0, 2.0, 0.5, 3.0])[:, None]
    scores[:, :, :2] = scores[1, :, -5:] = INF
    scores[0, 2, 20:40] = -INF
    budget = Budget(70, (1, 4), 3, 50)
    split = AdaKVAllocator(safeguard=safeguard).split([scores], budget)
    for row in range(3):
        expected = in_loops(scores[row].tolist(), 70, safeguard)
        assert split[row, 0].tolist() == pytest.approx(expected)
        assert sum(expected) == pytest.approx(70)
        assert int(apportion(split[row], budget).sum()) == 70


def test_ties_for_the_last_places_are_shared():
    # 5 free: 9 and 8, then three places for the four that are equal, three of them in the first head
    scores = torch.tensor([[[INF, 9, 7, 7, 7, 1], [INF, 8, 7, 2, 1, -INF]]])
    budget = Budget(7, (1, 2), 1, 6)
    split = AdaKVAllocator(safeguard=0).split([scores], budget)
    assert split.tolist() == [[[1 + 1 + 3 * 3 / 4, 1 + 1 + 3 * 1 / 4]]]
    turned = AdaKVAllocator(safeguard=0).split([scores.flip(2)], budget)
    assert torch.equal(turned, split), "wherever they lie"


def test_nothing_to_compare_is_split_evenly():
    for scores in (torch.full((1, 2, 3), -INF), torch.full((1, 2, 3), INF)):
        split = AdaKVAllocator(safeguard=0).split([scores], Budget(4, (1, 2), 1, 3))
        assert split[0, 0, 0] == split[0, 0, 1] > 0


@pytest.mark.parametrize("safeguard", [0.2, 0.0])
def test_a_cache_splits_each_layer_by_snapkvs_scores(safeguard):
    length, window = 160, 8
    policy = SnapKVPolicy(observation_window=window, recent_window=window)
    cache = after_prompt(ids_of(length), policy, retention=0.3, allocator=AdaKVAllocator(safeguard=safeguard))
    of = formula(window, 5, "avg")
    total = round(0.3 * length * 3 * 2) // 3
    expected, uneven = {}, False
    for layer, (attention, key) in enumerate(observed(ids_of(length))):
        scores = [of(layer, head, attention[head * 3 : head * 3 + 3], key[head]) for head in range(2)]
        competing = [[*head[:-window], *[INF] * window] for head in scores]
        shares = torch.tensor([in_loops(competing, total, safeguard)])
        counts = apportion(shares, Budget(total, (1, 2), 1, length))[0].tolist()
        assert cache.capacities[layer, 0].tolist() == counts and sum(counts) == total
        uneven |= abs(counts[0] - counts[1]) > 4
        for head, count in enumerate(counts):
            expected[layer, head] = best(dict(enumerate(scores[head])), count, seen=length, recent=window)
    assert uneven
    assert kept(cache) == expected


def test_without_a_safeguard_a_layer_keeps_its_best_whatever_their_head():
    length = 60
    cache = after_prompt(
        ids_of(length), L2NormPolicy(num_skipped_layers=0), retention=0.3, allocator=AdaKVAllocator(safeguard=0)
    )
    for layer, (_, key) in enumerate(observed(ids_of(length))):
        every = sorted((float(k.norm()), head, p) for head in range(2) for p, k in enumerate(key[head]))
        chosen = sorted((head, p) for _, head, p in every[:36])
        positions = kept(cache)
        assert sorted((head, p) for head in range(2) for p in positions[layer, head]) == chosen


def test_a_name_is_enough_and_the_total_is_exact():
    cache = after_prompt(ids_of(200), "snapkv", retention=0.4, allocator="adakv")
    assert int(cache.lengths.sum()) == 480
    assert cache.lengths[:, 0].sum(1).tolist() == [160] * 3


@pytest.mark.parametrize("bad", [-0.1, 1.1, float("nan")])
def test_a_bad_safeguard_is_refused(bad):
    with pytest.raises(PluginError, match="adakv: safeguard must lie in"):
        AdaKVAllocator(safeguard=bad)
