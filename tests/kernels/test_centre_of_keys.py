"""A row for each head, part of which turns with the position."""

import math

import pytest
import torch
from kvpolicy_kernels.key_centre import CIRCLE, KeyCentre

from tests.kernels.segments import DEVICE, key_centre


def row(centre, head, position):
    """float64 [D], term by term, with angles of whole parts of a circle."""
    out = centre.coefficients[0, head].double().cpu()
    for j, frequency in enumerate(centre.frequencies[head].tolist()):
        angle = 2 * math.pi * (frequency * position % CIRCLE) / CIRCLE
        cosine, sine = centre.coefficients[1 + 2 * j : 3 + 2 * j, head].double().cpu()
        out = out + cosine * math.cos(angle) + sine * math.sin(angle)
    return out


@pytest.mark.parametrize("pairs", [0, 1, 3])
@pytest.mark.parametrize(
    ("heads", "positions"),
    [([2], [7, 0, 2**20]), ([[0], [2]], [5, 6, 7, 8]), ([0, 1, 2], [[9], [10**6]]), ([0, 1], [4, 5])],
    ids=str,
)
def test_heads_and_positions_of_shapes_that_fit_each_other(heads, positions, pairs):
    """As what does not turn has to have them, too."""
    centre = key_centre(3, 16, pairs=pairs)
    heads, positions = (torch.tensor(x, device=DEVICE) for x in (heads, positions))
    found = centre.of(heads, positions.int())
    both = torch.broadcast_tensors(heads, positions)
    assert found.shape == (*both[0].shape, 16) and found.dtype == torch.float32
    rows = [row(centre, *own) for own in zip(*(x.flatten().tolist() for x in both), strict=True)]
    torch.testing.assert_close(found.flatten(0, -2).cpu().double(), torch.stack(rows), rtol=0, atol=1e-4)


@pytest.mark.parametrize("pairs", [0, 2])
def test_along_positions(pairs):
    centre = key_centre(3, 16, pairs=pairs)
    found = centre.along(5)
    assert found.shape == (3, 5, 16) and centre.shape == (3, 16)
    expected = torch.stack([torch.stack([row(centre, head, p) for p in range(5)]) for head in range(3)])
    torch.testing.assert_close(found.cpu().double(), expected, rtol=0, atol=1e-4)


def test_others_are_refused():
    own, turns = torch.zeros(3, 2, 16), torch.zeros(2, 1, dtype=torch.int32)
    KeyCentre(own, turns)
    for wrong in ((own[:2], turns), (own, turns[:1]), (own[0], turns), (own.double(), turns), (own, turns.long())):
        with pytest.raises(ValueError, match="expected coefficients float32"):
            KeyCentre(*wrong)
    with pytest.raises(ValueError, match="must be contiguous"):
        KeyCentre(torch.zeros(3, 16, 2).mT, turns)
