"""The paired bootstrap: a case by hand, coverage, and the words of the verdict."""

import itertools
import math

import pytest
import torch

from kvpolicy.measure.stats import PairedDifference, excess_share, mean_interval, paired_difference


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


FULL = torch.tensor([1.9, 2.4, 2.0, 3.1, 2.6], dtype=torch.float64)
UNIFORM = FULL + torch.tensor([0.5, 0.2, 0.4, 0.9, 0.3], dtype=torch.float64)
OURS = FULL + torch.tensor([0.1, 0.15, 0.3, 0.2, 0.25], dtype=torch.float64)


def share_of(picks):
    """The quotient of the perplexities' distances, computed from the perplexities of these sequences."""
    ours, uniform, full = (math.exp(sum(float(x[i]) for i in picks) / len(picks)) for x in (OURS, UNIFORM, FULL))
    return (ours - full) / (uniform - full)


def test_the_share_of_an_excess_is_a_quotient_of_perplexities_and_its_interval_cuts_2_5_percent_on_each_side():
    found = excess_share(OURS, UNIFORM, FULL)
    assert found.mean == pytest.approx(share_of(range(5))) and found.n == 5
    every = torch.tensor([share_of(picks) for picks in itertools.product(range(5), repeat=5)])
    for edge, side in ((found.low, every), (-found.high, -every)):
        beyond, up_to = (side < edge - 1e-6).float().mean(), (side <= edge + 1e-6).float().mean()
        assert beyond < 0.03 and up_to > 0.02, "0.025, less the noise of 10 000 drawn resamples"
    assert excess_share(OURS, UNIFORM, FULL, seed=3) == excess_share(OURS, UNIFORM, FULL, seed=3)


@pytest.mark.parametrize("part", [0.0, 0.5, 1.0])
def test_the_share_is_known_where_every_sequence_says_the_same(part):
    full = torch.rand(6, dtype=torch.float64)
    found = excess_share(full + math.log1p(part * 0.2), full + math.log1p(0.2), full)
    assert (found.mean, found.low, found.high) == pytest.approx([part] * 3)


@pytest.mark.parametrize("costs", [(0.0, 0.0, 0.0), (0.1, -0.2, 0.05), (-0.1, -0.1, -0.2)])
def test_there_is_no_share_of_an_excess_that_is_not_clearly_above_nothing(costs):
    full = torch.rand(3, dtype=torch.float64)
    assert excess_share(full + 1, full + torch.tensor(costs), full) is None


def test_a_share_is_finite_where_some_draws_of_sequences_cost_nothing():
    """One of eight sequences gains: drawn often enough it outweighs the others, which happens in under 2.5 %."""
    full, costs = torch.zeros(8, dtype=torch.float64), torch.tensor([0.1] * 7 + [-0.15], dtype=torch.float64)
    draws = torch.randint(8, (20_000, 8), generator=torch.Generator().manual_seed(9))
    assert 0 < (costs[draws].mean(1) <= 0).double().mean() < 0.025, "the case is what it says"
    found = excess_share(full + 0.5 * costs.clamp(min=0), full + costs, full)
    assert 0 < found.low < found.mean < found.high < math.inf
