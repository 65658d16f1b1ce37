import math

import pytest
import torch
from kvpolicy_baselines.keydiff import KeyDiffPolicy

from kvpolicy import LayerActivations
from kvpolicy.testing import check_eviction_policy
from tests.plugins.direct import assert_decodes_like, assert_keeps_the_best, cosine


def unlikeness(keys):
    """Minus the cosine of each key and the mean of the normalised keys."""
    keys = list(keys)
    unit = [[x / math.hypot(*key) for x in key] for key in keys]
    anchor = [sum(column) / len(keys) for column in zip(*unit, strict=True)]
    return [-cosine(key, anchor) for key in keys]


def test_laws():
    check_eviction_policy(KeyDiffPolicy)


def test_keys_unlike_the_others_are_kept():
    assert_keeps_the_best("keydiff", lambda layer, head, attention, key: unlikeness(key.double().tolist()))


def test_the_anchor_moves_in_decoding():
    def step(scores, queries, keys):
        return dict(zip(keys, unlikeness(keys.values()), strict=True))

    kept = assert_decodes_like(KeyDiffPolicy(), lambda q, keys: unlikeness(keys), step)
    assert any(p < 24 for p in kept[0]) and any(p >= 24 for p in kept[0])


def test_the_lengths_of_keys_do_not_matter_to_the_anchor():
    # normalised, two keys to the right and one up: the anchor leans to the right, however long the one is
    keys = torch.tensor([[[[1.0, 0.0], [1.0, 0.0], [0.0, 100.0]]]])
    positions = torch.tensor([[[0, 1, 2]]])
    scores = KeyDiffPolicy().score_prompt(LayerActivations(layer=0, keys=keys, positions=positions))
    assert scores[0, 0].tolist() == pytest.approx([-2 / math.sqrt(5), -2 / math.sqrt(5), -1 / math.sqrt(5)])


def test_absent_entries_are_not_in_the_anchor():
    keys = torch.tensor([[[[math.nan, 1.0], [1.0, 0.0], [3.0, 4.0]]]])
    scores = KeyDiffPolicy().score_prompt(LayerActivations(layer=0, keys=keys, positions=torch.tensor([[[-1, 0, 1]]])))
    assert scores[0, 0, 1:].tolist() == pytest.approx(unlikeness([[1.0, 0.0], [3.0, 4.0]]))
    assert not scores.isnan().any()
