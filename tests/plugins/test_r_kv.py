import math

import pytest
import torch
from kvpolicy_baselines import r_kv
from kvpolicy_baselines.r_kv import RKVPolicy
from torch.utils._python_dispatch import TorchDispatchMode

from kvpolicy import DecodeStep, LayerActivations, PluginError
from kvpolicy.testing import check_eviction_policy
from tests.plugins.direct import assert_decodes_like, assert_keeps_the_best, cosine, softmax

KEPT = 1e9  # no score comes near it


def distribution(values):
    return [value / sum(values) for value in values]


def redundancy(keys, spare=None):
    """Softmax of the mean cosine with the others, by the whole matrix. keys in order of age.

    spare: cosine above which the most recent key alike is left out
    """
    table = [[0.0 if i == j else cosine(a, b) for j, b in enumerate(keys)] for i, a in enumerate(keys)]
    for row in table:
        alike = [j for j, c in enumerate(row) if spare is not None and c > spare]
        if alike:
            row[alike[-1]] = 0.0
    return distribution([math.exp(sum(column) / len(keys)) for column in zip(*table, strict=True)])


def scored(mass, keys, *, mix=0.1, kernel=7, window=8, spare=0.5):
    """Scores by age, those in the window `KEPT`. mass: attention of the last queries."""
    front = len(keys) - window
    importance = distribution(mass[:front])
    pooled = [max(importance[max(0, p - kernel // 2) : p + kernel // 2 + 1]) for p in range(front)]
    costs = redundancy(keys, spare)
    return [len(keys) * (mix * pooled[p] - (1 - mix) * costs[p]) for p in range(front)] + [KEPT] * window


def of_model(**options):
    def scores(layer, head, attention, key):
        mass = attention[:, -options.get("window", 8) :].double().sum((0, 1)).tolist()
        return scored(mass, key.double().tolist(), **options)

    return scores


def test_laws():
    check_eviction_policy(RKVPolicy)
    check_eviction_policy(RKVPolicy(mix=1.0, kernel_size=1, observation_window=1, threshold=0.0))


def test_the_defaults_keep_what_is_attended_to_and_not_said_twice():
    assert_keeps_the_best("r_kv", of_model(), length=60, retention=0.4)


@pytest.mark.parametrize(
    ("options", "direct"),
    [
        ({"mix": 0.0}, {"mix": 0.0}),
        ({"mix": 0.7, "kernel_size": 1}, {"mix": 0.7, "kernel": 1}),
        ({"threshold": 0.8}, {"spare": 0.8}),
        ({"threshold": 0.0}, {"spare": 0.0}),
        ({"observation_window": 4, "recent_window": 2, "kernel_size": 3}, {"window": 4, "kernel": 3}),
    ],
)
def test_parameters(options, direct):
    assert_keeps_the_best(RKVPolicy(**options), of_model(**direct))


@pytest.mark.parametrize("block", [1, 200, 2**24])
@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_an_evicted_cache_is_scored_by_position_in_blocks(block, threshold, monkeypatch):
    """Entries in no order, gaps between positions, absent ones that hold NaN."""
    monkeypatch.setattr(r_kv, "_BLOCK", block)
    generator = torch.Generator().manual_seed(3)
    positions = torch.stack([torch.randperm(40, generator=generator)[:20] for _ in range(4)]).view(2, 2, 20)
    positions[0, 1, 3:7] = positions[1, :, :2] = -1
    positions[:, :, 19] = 40
    mass = torch.rand(2, 2, 20, generator=generator).masked_fill(positions < 0, 0.0)
    keys = torch.randn(2, 2, 20, 4, generator=generator).masked_fill((positions < 0)[..., None], math.nan)
    policy = RKVPolicy(observation_window=3, kernel_size=1, threshold=threshold)
    scores = policy.score_prompt(LayerActivations(0, positions=positions, keys=keys, window_attention=mass))
    assert scores.isfinite().all()
    for row, head in ((0, 0), (0, 1), (1, 0), (1, 1)):
        order = [c for c in positions[row, head].argsort().tolist() if positions[row, head, c] >= 0]
        window = sum(int(positions[row, head, c]) > 37 for c in order)
        own, given = mass[row, head, order].double().tolist(), keys[row, head, order].double().tolist()
        expected = scored(own, given, kernel=1, window=window, spare=threshold)
        got = scores[row, head, order].tolist()
        assert got[: len(got) - window] == pytest.approx(expected[: len(got) - window], abs=1e-5)
        assert min(got[len(got) - window :]) > KEPT


def prompt_of(window):
    def scores(queries, keys):
        mass = [0.0] * len(keys)
        for rows in queries:
            for position in range(len(keys) - window, len(keys)):
                for other, weight in enumerate(softmax(rows[position], keys[: position + 1])):
                    mass[other] += weight
        return scored(mass, keys, window=window)

    return scores


def step_of(window):
    def scores(before, queries, keys):
        order = sorted(keys)
        rows = [softmax(query, [keys[p] for p in order]) for query in queries]
        mass = {p: sum(weights) for p, weights in zip(order, zip(*rows, strict=True), strict=True)}
        front = [p for p in order if p <= order[-1] - window]
        importance = dict(zip(front, distribution([mass[p] for p in front]), strict=True)) if front else {}
        costs = dict(zip(order, redundancy([keys[p] for p in order]), strict=True))
        after = dict.fromkeys(order, KEPT)
        for p in front:
            now = len(order) * (0.1 * importance[p] - 0.9 * costs[p])
            after[p] = now if before[p] >= KEPT else (1 - 1 / window) * before[p] + now / window
        return after

    return scores


@pytest.mark.parametrize("window", [1, 3, 5])
def test_decoding_averages_over_the_last_queries(window):
    policy = RKVPolicy(observation_window=window, recent_window=window)
    kept = assert_decodes_like(policy, prompt_of(window), step_of(window))
    for positions in kept:
        assert positions[-window:] == list(range(48 - window, 48)) and positions[0] < 40


def test_repeated_keys_go_first_and_the_last_of_them_stays():
    keys = torch.eye(16).index_select(0, torch.tensor([0, 1, 2, 3, 3, 3, 3, 4, 5, 6, 7, 8]))
    given = LayerActivations(
        0,
        positions=torch.arange(12)[None, None],
        keys=keys[None, None],
        window_attention=torch.ones(1, 1, 12),
    )
    scores = RKVPolicy(observation_window=2, recent_window=2).score_prompt(given)[0, 0]
    worst = sorted(range(12), key=lambda p: float(scores[p]))[:3]
    assert sorted(worst) == [3, 4, 5]


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation returned."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.count = max(self.count, out.numel() if isinstance(out, torch.Tensor) else 0)
        return out


def test_a_step_compares_no_pairs():
    count, dim = 900, 8
    step = DecodeStep(
        layer=0,
        num_kv_heads=2,
        segment=torch.arange(2).repeat_interleave(count // 2),
        scores=torch.zeros(count),
        positions=torch.arange(count // 2, dtype=torch.int32).repeat(2),
        lengths=torch.full((2,), count // 2),
        seen=torch.tensor([count // 2]),
        max_positions=count,
        keys=torch.randn(count, dim),
        attention=torch.rand(count),
    )
    with Largest() as largest:
        scores = RKVPolicy().score_step(step)
    assert largest.count == count * dim
    assert int((scores > KEPT).sum()) == 2 * 8


@pytest.mark.parametrize("bad", [{"mix": 1.5}, {"kernel_size": 4}, {"threshold": -0.1}, {"observation_window": 0}])
def test_bad_parameters_are_refused(bad):
    with pytest.raises(PluginError, match=f"r_kv: {next(iter(bad))} must"):
        RKVPolicy(**bad)
