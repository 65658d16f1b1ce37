"""The laws of an allocator, then what makes this one what it is."""

from __future__ import annotations

import pytest
import torch
from kvpolicy_template.softmax import SoftmaxAllocator

import kvpolicy
from kvpolicy.testing import check_allocator


def test_keeps_the_laws() -> None:
    check_allocator(SoftmaxAllocator)


def test_runs_from_even_to_one_head() -> None:
    importance = kvpolicy.Importance(torch.tensor([[1.0, 2.0], [3.0, 2.0]]))
    budget = kvpolicy.Budget(total=100, shape=(2, 2), floor=5, ceiling=64)
    even, sharp = (SoftmaxAllocator(t).shares(importance, budget) for t in (1e6, 0.01))
    torch.testing.assert_close(even, torch.full((2, 2), 0.25), atol=1e-5, rtol=0)
    assert float(sharp[1, 0]) > 0.99


def test_refuses_a_temperature_of_zero() -> None:
    with pytest.raises(ValueError, match="temperature must be > 0, got 0"):
        SoftmaxAllocator(0)


def test_installed_package_is_found_by_name() -> None:
    assert kvpolicy.registry.get("allocator", "kvpolicy-template:softmax") is SoftmaxAllocator
