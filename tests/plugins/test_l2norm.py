import math

import torch
from kvpolicy_baselines.l2norm import L2NormPolicy

from kvpolicy import LayerActivations
from kvpolicy.testing import check_eviction_policy
from tests.plugins.direct import assert_decodes_like, assert_keeps_the_best


def norms(keys):
    return [-math.sqrt(sum(x * x for x in key)) for key in keys]


def test_laws():
    check_eviction_policy(L2NormPolicy)


def test_the_shortest_keys_are_kept():
    assert_keeps_the_best("l2norm", lambda layer, head, attention, key: norms(key.double().tolist()))


def test_decoded_tokens_compete():
    def step(scores, queries, keys):
        return dict(zip(keys, norms(keys.values()), strict=True))

    kept = assert_decodes_like(L2NormPolicy(recent_window=2), lambda q, keys: norms(keys), step, recent=2)
    for positions in kept:
        assert any(p < 24 for p in positions) and not set(range(24, 46)) <= set(positions)


def test_keys_of_absent_entries_may_be_nan():
    keys, positions = torch.ones(1, 1, 3, 4), torch.tensor([[[-1, 0, 1]]])
    keys[0, 0, 0] = math.nan
    scores = L2NormPolicy().score_prompt(LayerActivations(layer=0, keys=keys, positions=positions))
    assert scores[0, 0, 1:].tolist() == [-2.0, -2.0] and not scores.isnan().any()


def test_half_precision_is_measured_in_float32():
    keys = torch.full((1, 1, 1, 4), 60000.0, dtype=torch.float16)  # its square overflows
    scores = L2NormPolicy().score_prompt(LayerActivations(layer=0, keys=keys, positions=torch.tensor([[[0]]])))
    assert scores.item() == -2 * float(keys[0, 0, 0, 0])
