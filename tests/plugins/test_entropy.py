from itertools import pairwise

import pytest
import torch
from kvpolicy_baselines.entropy import EntropyEstimator

from kvpolicy import LayerActivations, PluginError, TransformersProbe
from kvpolicy.testing import SyntheticProbe, check_estimator
from tests.plugins.direct import ids_of, observed
from tests.tiny import tiny_ids, tiny_model


def needed(attention, mass, window):
    """How many entries, the best first, until enough of the attention is there. attention: [group, T, T] of one head"""
    rows = attention[:, -window:].double().reshape(-1, attention.shape[-1]).tolist()
    columns = sorted((sum(column) for column in zip(*rows, strict=True)), reverse=True)
    kept = 0.0
    for count, column in enumerate(columns, 1):
        kept += column
        if kept >= mass * len(rows):  # the attention of one query sums to 1
            return count
    raise AssertionError("never enough")


def test_laws():
    check_estimator(EntropyEstimator)
    check_estimator(EntropyEstimator(mass=0.5, observation_window=1))


@pytest.mark.parametrize(("mass", "window"), [(0.9, 64), (0.9, 7), (0.5, 16), (0.99, 1)])
def test_equals_a_direct_computation(mass, window):
    lengths = (50, 90)
    probe = TransformersProbe(tiny_model("Llama"), tiny_ids(64), [ids_of(n)[0] for n in lengths])
    found = EntropyEstimator(mass=mass, observation_window=window).estimate(probe)
    expected = torch.zeros(3, 2)
    for length in lengths:
        for layer, (attention, _) in enumerate(observed(ids_of(length))):
            for head in range(2):
                expected[layer, head] += needed(attention[head * 3 : head * 3 + 3], mass, window) / len(lengths)
    assert found.per_head.tolist() == expected.tolist()
    assert found.per_layer.tolist() == pytest.approx(expected.mean(1).tolist())
    assert len(expected.unique()) > 2, "heads must differ for this to say anything"


class Fixed(SyntheticProbe):
    """One layer whose attention is given."""

    def __init__(self, attention):
        super().__init__(num_layers=1)
        self.attention = torch.tensor([attention])

    def observe(self, visit, requires, *, prompts=None, observation_window=32):
        visit(LayerActivations(layer=0, window_attention=self.attention))


def test_by_hand():
    # 10 in all: 6 + 2 make 0.8, 6 + 2 + 1 make 0.9; the even head needs all but one of ten for 0.9
    probe = Fixed([[0.0, 6.0, 1.0, 0.5, 2.0, 0.5, 0.0, 0.0, 0.0, 0.0], [1.0] * 10])
    assert EntropyEstimator(mass=0.75).estimate(probe).per_head.tolist() == [[2, 8]]
    assert EntropyEstimator(mass=0.85).estimate(probe).per_head.tolist() == [[3, 9]]
    assert EntropyEstimator(mass=0.01).estimate(probe).per_head.tolist() == [[1, 1]]
    assert EntropyEstimator(mass=0.75).estimate(probe).per_layer.tolist() == [5]


def test_exactly_enough_is_enough():
    assert EntropyEstimator(mass=0.75).estimate(Fixed([[4.0, 2.0, 1.0, 1.0], [2.0] * 4])).per_head.tolist() == [[2, 3]]


def test_more_mass_never_needs_fewer_entries():
    found = [EntropyEstimator(mass=mass).estimate(SyntheticProbe()).per_head for mass in (0.2, 0.5, 0.9, 0.99)]
    assert all(bool((a <= b).all()) and bool((a < b).any()) for a, b in pairwise(found))


@pytest.mark.parametrize("bad", [{"mass": 0.0}, {"mass": 1.0}, {"mass": float("nan")}, {"observation_window": 0}])
def test_bad_parameters_are_refused(bad):
    with pytest.raises(PluginError, match="entropy: mass must lie in"):
        EntropyEstimator(**bad)


def test_a_probe_without_prompts_is_refused():
    with pytest.raises(PluginError, match="entropy: the probe ran no prompt"):
        EntropyEstimator().estimate(TransformersProbe(tiny_model("Llama"), tiny_ids(64)))
