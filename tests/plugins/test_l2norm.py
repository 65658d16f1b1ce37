import math

import pytest
import torch
from kvpolicy_baselines.l2norm import L2NormPolicy

from kvpolicy import LayerActivations, PluginError
from kvpolicy.testing import check_eviction_policy
from tests.plugins.direct import after_prompt, assert_decodes_like, assert_keeps_the_best, best, ids_of, kept, observed


def norms(keys):
    return [-math.sqrt(sum(x * x for x in key)) for key in keys]


def test_laws():
    for num_skipped_layers in range(4):  # layers 0 and 2 are checked
        check_eviction_policy(L2NormPolicy(num_skipped_layers=num_skipped_layers))


def test_the_shortest_keys_are_kept():
    assert_keeps_the_best(
        L2NormPolicy(num_skipped_layers=0), lambda layer, head, attention, key: norms(key.double().tolist())
    )


@pytest.mark.parametrize("skipped", [1, 2])
def test_the_first_layers_keep_the_most_recent(skipped):
    policy = "l2norm" if skipped == 2 else L2NormPolicy(num_skipped_layers=skipped)
    held = kept(after_prompt(ids_of(60), policy, retention=0.3))
    for layer, (_, key) in enumerate(observed(ids_of(60))):
        for head in range(2):
            scores = dict(enumerate(norms(key[head].double().tolist())))
            expected = list(range(42, 60)) if layer < skipped else best(scores, 18, seen=60)
            assert held[layer, head] == expected


def test_a_skipped_layer_keeps_the_most_recent_in_decoding():
    kept = assert_decodes_like(
        L2NormPolicy(), lambda q, keys: list(range(len(keys))), lambda scores, q, keys: {p: float(p) for p in keys}
    )
    assert kept == [list(range(48 - capacity, 48)) for capacity in (9, 13)]


def test_bad_parameters_are_refused():
    with pytest.raises(PluginError, match="l2norm: num_skipped_layers must be at least 0, got -1"):
        L2NormPolicy(num_skipped_layers=-1)


def test_decoded_tokens_compete():
    def step(scores, queries, keys):
        return dict(zip(keys, norms(keys.values()), strict=True))

    policy = L2NormPolicy(num_skipped_layers=0, recent_window=2)
    kept = assert_decodes_like(policy, lambda q, keys: norms(keys), step, recent=2)
    for positions in kept:
        assert any(p < 24 for p in positions) and not set(range(24, 46)) <= set(positions)


def test_keys_of_absent_entries_may_be_nan():
    keys, positions = torch.ones(1, 1, 3, 4), torch.tensor([[[-1, 0, 1]]])
    keys[0, 0, 0] = math.nan
    scores = L2NormPolicy().score_prompt(LayerActivations(layer=2, keys=keys, positions=positions))
    assert scores[0, 0, 1:].tolist() == [-2.0, -2.0] and not scores.isnan().any()


def test_half_precision_is_measured_in_float32():
    keys = torch.full((1, 1, 1, 4), 60000.0, dtype=torch.float16)  # its square overflows
    scores = L2NormPolicy().score_prompt(LayerActivations(layer=2, keys=keys, positions=torch.tensor([[[0]]])))
    assert scores.item() == -2 * float(keys[0, 0, 0, 0])
