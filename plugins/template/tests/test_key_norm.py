"""The laws of an eviction policy, then what makes this one what it is."""

from __future__ import annotations

import torch
from kvpolicy_template.key_norm import KeyNormPolicy

import kvpolicy
from kvpolicy.testing import check_eviction_policy


def test_keeps_the_laws() -> None:
    check_eviction_policy(KeyNormPolicy)


def test_prefers_short_keys() -> None:
    keys = torch.tensor([[[[3.0, 4.0], [0.0, 1.0], [0.0, torch.nan], [0.0, 2.0]]]])
    positions = torch.tensor([[[0, 1, -1, 2]]])
    scores = KeyNormPolicy().score_prompt(kvpolicy.LayerActivations(layer=0, keys=keys, positions=positions))
    torch.testing.assert_close(scores, torch.tensor([[[-5.0, -1.0, 0.0, -2.0]]]))


def test_installed_package_is_found_by_name() -> None:
    assert kvpolicy.registry.get("policy", "kvpolicy-template:key_norm") is KeyNormPolicy
