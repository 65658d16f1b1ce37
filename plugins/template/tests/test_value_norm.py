"""The laws of an estimator, then what makes this one what it is."""

from __future__ import annotations

import torch
from kvpolicy_template.value_norm import ValueNormEstimator

import kvpolicy
from kvpolicy.testing import SyntheticProbe, check_estimator


def test_keeps_the_laws() -> None:
    check_estimator(ValueNormEstimator)


def test_is_the_mean_norm() -> None:
    probe = SyntheticProbe(lengths=(12,))
    values = probe.activations(1, requires=frozenset({"values"}), length=12).values
    expected = values[0].norm(dim=-1).mean(-1)
    torch.testing.assert_close(ValueNormEstimator().estimate(probe).per_head[1], expected)


def test_installed_package_is_found_by_name() -> None:
    assert kvpolicy.registry.get("estimator", "kvpolicy-template:value_norm") is ValueNormEstimator
