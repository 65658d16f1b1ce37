import pytest
import torch
from kvpolicy_baselines.snapkv import SnapKVPolicy

from kvpolicy import LayerActivations, PluginError
from kvpolicy.testing import check_eviction_policy
from tests.cache.play import store_of, tensors
from tests.plugins.direct import assert_decodes_like, assert_keeps_the_best, softmax

SMALL = SnapKVPolicy(observation_window=4, recent_window=4)


def pooled(mass, seen, window, kernel, pooling):
    """{position: score} outside the window. mass: {position: attention of the window}."""
    prefix = {p: m for p, m in mass.items() if p < seen - window}
    scores = {}
    for position in prefix:
        near = [prefix.get(position + d, 0.0) for d in range(-(kernel // 2), kernel // 2 + 1)]
        scores[position] = max(near) if pooling == "max" else sum(near) / kernel
    return scores


def formula(window, kernel, pooling):
    def scores(layer, head, attention, key):
        length = len(key)
        mass = {p: float(attention[:, -window:, p].double().sum()) for p in range(length)}
        return list((dict.fromkeys(range(length), 0.0) | pooled(mass, length, window, kernel, pooling)).values())

    return scores


@pytest.mark.parametrize("policy", [SnapKVPolicy(), SMALL, SnapKVPolicy(observation_window=8, pooling="max")])
def test_laws(policy):
    check_eviction_policy(policy)


def test_the_defaults_keep_the_formulas_best_and_the_window():
    assert_keeps_the_best("snapkv", formula(32, 5, "avg"), length=160, retention=0.4, recent=32)


@pytest.mark.parametrize(("kernel", "pooling"), [(1, "avg"), (7, "avg"), (3, "max"), (7, "max")])
def test_kernels(kernel, pooling):
    policy = SnapKVPolicy(kernel_size=kernel, pooling=pooling, observation_window=4, recent_window=4)
    assert_keeps_the_best(policy, formula(4, kernel, pooling), recent=4)


@pytest.mark.parametrize("pooling", ["avg", "max"])
@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_an_evicted_cache_is_pooled_by_position(pooling, window, seed):
    """Entries in no order, gaps between their positions, and absent ones that hold anything."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.stack([torch.randperm(30, generator=generator)[:16] for _ in range(4)]).view(2, 2, 16)
    positions = torch.cat([positions, torch.arange(30, 38).expand(2, 2, 8)], 2)
    positions[0, 1, 3:7] = positions[1, :, -8:-6] = -1
    mass = torch.rand(2, 2, 24, generator=generator)
    policy = SnapKVPolicy(pooling=pooling, observation_window=window)
    given = LayerActivations(layer=0, window_attention=mass, positions=positions)
    scores = policy.score_prompt(given)
    assert scores.isfinite().all()
    for row in range(2):
        for head in range(2):
            where = positions[row, head].tolist()
            held = {p: float(m) for p, m in zip(where, mass[row, head], strict=True) if p >= 0}
            expected = pooled(held, 38, window, 5, pooling)
            for position, score in zip(where, scores[row, head].tolist(), strict=True):
                if position >= 38 - window:
                    assert score == pytest.approx(max(expected.values())), "the window is as good as the best"
                elif position >= 0:
                    assert score == pytest.approx(expected[position])


def test_decoding_leaves_the_scores_and_keeps_decoded_tokens_longest():
    def prompt(queries, keys):
        mass = dict.fromkeys(range(len(keys)), 0.0)
        for rows in queries:
            for position in range(len(keys) - 4, len(keys)):
                for other, weight in enumerate(softmax(rows[position], keys[: position + 1])):
                    mass[other] += weight
        scores = pooled(mass, len(keys), 4, 5, "avg")
        return [scores.get(p, max(scores.values())) for p in mass]

    kept = assert_decodes_like(SMALL, prompt, lambda scores, queries, keys: scores, recent=4)
    assert kept == [list(range(48 - capacity, 48)) for capacity in (9, 13)]  # more was decoded than there is room for


def test_a_decoded_token_pushes_out_the_worst_of_the_prompt():
    query, key, value = tensors(26)
    store = store_of(SMALL, [12, 12])
    store.prefill(0, *(x[:, :, :24] for x in (query, key, value)))
    before, scores = (x.view(2, -1) for x in (torch.cat(store.positions(0)), store.layers[0].arena.padded_scores()))
    store.decode(0, *(x[:, :, 24:25] for x in (query, key, value)))
    for head in range(2):
        plain = {int(p): float(s) for p, s in zip(before[head], scores[head], strict=True) if p < 20}
        worst = min(plain, key=plain.get)
        after = set(store.positions(0)[head].tolist())
        assert after == set(before[head].tolist()) - {worst} | {24}


@pytest.mark.parametrize("bad", [{"kernel_size": 4}, {"kernel_size": 0}, {"pooling": "sum"}, {"observation_window": 0}])
def test_bad_parameters_are_refused(bad):
    with pytest.raises(PluginError, match=f"snapkv: {next(iter(bad))} must"):
        SnapKVPolicy(**bad)
