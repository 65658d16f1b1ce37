"""The laws of each role, then what makes these plugins what they are."""

from __future__ import annotations

import pytest
import torch
from kvpolicy_template.key_norm import KeyNormPolicy
from kvpolicy_template.softmax import SoftmaxAllocator
from kvpolicy_template.value_norm import ValueNormEstimator

import kvpolicy
from kvpolicy.testing import SyntheticProbe, check_allocator, check_estimator, check_eviction_policy


def test_value_norm_keeps_the_laws() -> None:
    check_estimator(ValueNormEstimator)


def test_softmax_keeps_the_laws() -> None:
    check_allocator(SoftmaxAllocator)


def test_key_norm_keeps_the_laws() -> None:
    check_eviction_policy(KeyNormPolicy)


def test_value_norm_is_the_mean_norm() -> None:
    probe = SyntheticProbe(lengths=(12,))
    values = probe.activations(1, requires=frozenset({"values"}), length=12).values
    expected = values[0].norm(dim=-1).mean(-1)
    torch.testing.assert_close(ValueNormEstimator().estimate(probe).per_head[1], expected)


def test_softmax_runs_from_even_to_one_head() -> None:
    importance = kvpolicy.Importance(torch.tensor([[1.0, 2.0], [3.0, 2.0]]))
    budget = kvpolicy.Budget(total=100, shape=(2, 2), floor=5, ceiling=64)
    even, sharp = (SoftmaxAllocator(t).shares(importance, budget) for t in (1e6, 0.01))
    torch.testing.assert_close(even, torch.full((2, 2), 0.25), atol=1e-5, rtol=0)
    assert float(sharp[1, 0]) > 0.99


def test_softmax_refuses_a_temperature_of_zero() -> None:
    with pytest.raises(ValueError, match="temperature must be > 0, got 0"):
        SoftmaxAllocator(0)


def test_key_norm_prefers_short_keys() -> None:
    keys = torch.tensor([[[[3.0, 4.0], [0.0, 1.0], [0.0, 2.0]]]])
    scores = KeyNormPolicy().score_prompt(kvpolicy.LayerActivations(layer=0, keys=keys))
    torch.testing.assert_close(scores, torch.tensor([[[-5.0, -1.0, -2.0]]]))


@pytest.mark.parametrize(
    ("role", "name", "cls"),
    [
        ("estimator", "value_norm", ValueNormEstimator),
        ("allocator", "softmax", SoftmaxAllocator),
        ("policy", "key_norm", KeyNormPolicy),
    ],
)
def test_installed_package_is_found_by_name(role: str, name: str, cls: type) -> None:
    assert kvpolicy.registry.get(role, f"kvpolicy-template:{name}") is cls  # type: ignore[call-overload]
