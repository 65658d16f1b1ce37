"""The paired bootstrap: a case by hand, coverage, and the words of the verdict."""

import itertools

import pytest
import torch

from kvpolicy.stats import PairedDifference, mean_interval, paired_difference


def test_two_pairs_give_the_interval_of_their_four_resamples():
    """Means of the resamples of (0, 1): 0, 1/2, 1/2, 1 with probability 1/4 each; 2.5 % lie in the outer ones."""
    found = paired_difference(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0]))
    assert (found.mean, found.low, found.high, found.n) == (0.5, 0.0, 1.0, 2)


def test_the_interval_cuts_2_5_percent_of_all_resamples_on_each_side():
    difference = torch.tensor([-0.3, 0.1, 0.2, 0.9, 1.6], dtype=torch.float64)
    means = torch.tensor(list(itertools.product(difference.tolist(), repeat=5))).mean(1)
    found = paired_difference(difference, torch.zeros(5))
    assert found.mean == pytest.approx(0.5)
    for edge, side in ((found.low, means), (-found.high, -means)):
        beyond, up_to = (side < edge - 1e-6).float().mean(), (side <= edge + 1e-6).float().mean()
        assert beyond < 0.03 and up_to > 0.02, "0.025, less the noise of 10 000 drawn resamples"


def test_only_the_differences_of_pairs_count():
    a, b = torch.rand(20), torch.rand(20)
    shift = 100 * torch.rand(20, dtype=torch.float64)
    plain = paired_difference(a.double(), b.double())
    assert paired_difference(a + shift, b + shift).low == pytest.approx(plain.low, abs=1e-9)
    assert paired_difference(b, a).high == pytest.approx(-plain.low, abs=0.02)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    """n = 30 normal differences around 0.3: the percentile bootstrap covers in about 93 % of the cases."""
    generator = torch.Generator().manual_seed(0)
    samples = 0.3 + torch.randn(300, 30, generator=generator)
    found = [paired_difference(row, torch.zeros(30)) for row in samples]
    covered = sum(x.low <= 0.3 <= x.high for x in found) / len(found)
    assert 0.89 <= covered <= 0.97
    below = sum(x.high < 0.3 for x in found) / len(found)
    above = sum(x.low > 0.3 for x in found) / len(found)
    assert max(below, above) <= 0.07, "neither side takes all misses"


def test_the_same_seed_gives_the_same_interval():
    a, b = torch.rand(9), torch.rand(9)
    assert paired_difference(a, b, seed=3) == paired_difference(a, b, seed=3)
    assert paired_difference(a, b, seed=3) != paired_difference(a, b, seed=4)


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (-0.2, -0.1, "better than"),
        (-0.2, 0.0, "not distinguishable from"),
        (-0.2, 0.1, "not distinguishable from"),
        (0.0, 0.1, "not distinguishable from"),
        (0.1, 0.2, "worse than"),
    ],
)
def test_verdict_follows_the_interval(low, high, words):
    assert PairedDifference((low + high) / 2, low, high, 8).verdict == words


@pytest.mark.parametrize(("shift", "words"), [(-1.0, "better than"), (1.0, "worse than")])
def test_a_clear_difference_is_called_by_its_sign(shift, words):
    b = torch.rand(8)
    assert paired_difference(b + shift, b).verdict == words


def test_equal_losses_are_not_distinguishable():
    a = torch.rand(8)
    found = paired_difference(a, a.clone())
    assert (found.mean, found.low, found.high, found.verdict) == (0.0, 0.0, 0.0, "not distinguishable from")


def test_the_interval_of_a_mean_is_that_of_the_difference_from_nothing():
    losses = torch.rand(12)
    paired = paired_difference(losses, torch.zeros(12), seed=5)
    assert mean_interval(losses, seed=5) == (paired.low, paired.high)
    assert paired.low < float(losses.mean()) < paired.high
