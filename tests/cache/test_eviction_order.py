"""When entries that a window protects at first leave: against one eviction after another."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvpolicy.cache import eviction_order


@given(st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=1, max_size=14), st.integers(1, 12), st.data())
def test_each_eviction_takes_the_worst_that_may_leave(candidates, count, data):
    keys = data.draw(st.permutations(range(len(candidates))))
    opens = [opens if present else count + 1 for opens, present in candidates]
    expected, left = [count + 1] * len(keys), set(range(len(keys)))
    for step in range(1, count + 1):
        if free := [each for each in left if opens[each] <= step]:
            gone = min(free, key=keys.__getitem__)
            expected[gone] = step
            left.remove(gone)
    for most in (1, 2**24):  # candidate by candidate, and all at once
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(eviction_order, "_MOST", most)
            found = eviction_order._slots(torch.tensor([keys, keys]), torch.tensor([opens, opens]), count)
        assert found.tolist() == [expected, expected]
