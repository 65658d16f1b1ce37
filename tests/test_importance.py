"""What heads lose together goes with the curves, and is finite."""

import pytest
import torch

from kvpolicy import BudgetError, Importance

HEADS, POINTS = torch.ones(2, 3), torch.tensor([4, 8])


def importance(together):
    return Importance(HEADS, None, torch.ones(2, 3, 2), POINTS, None, together)


def test_it_may_be_below_zero():
    assert float(importance(torch.full((2, 3, 2, 2, 3, 2), -1.0)).together.sum()) == -144


@pytest.mark.parametrize("shape", [(2, 3, 2), (2, 3, 2, 2, 3, 1)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(BudgetError, match=r"importance together is \[.*\], expected \[2, 3, 2, 2, 3, 2\]"):
        importance(torch.zeros(shape))


def test_it_needs_curves_and_numbers():
    with pytest.raises(BudgetError, match="importance together was given without curves"):
        Importance(HEADS, together=torch.zeros(2, 3, 2, 2, 3, 2))
    with pytest.raises(BudgetError, match="importance together must be finite"):
        importance(torch.full((2, 3, 2, 2, 3, 2), torch.nan))
