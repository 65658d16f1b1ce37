import pytest
import torch
from kvpolicy_baklava.estimator import CosineEstimator
from kvpolicy_baselines.shuffled import ShuffledEstimator

import kvpolicy
from kvpolicy import Importance, PluginError
from kvpolicy.testing import SyntheticProbe, check_estimator

PROBE = SyntheticProbe(num_layers=6, num_q_heads=8, num_kv_heads=4)


def values(table):
    return sorted(table.flatten().tolist())


def test_laws():
    check_estimator(ShuffledEstimator)
    check_estimator(ShuffledEstimator(estimator="entropy", estimator_params={"mass": 0.5}, seed=-2))


@pytest.mark.parametrize("seed", [0, 1, -1, 2**70])
def test_same_values_in_other_places(seed):
    known, found = CosineEstimator().estimate(PROBE), ShuffledEstimator(seed=seed).estimate(PROBE)
    assert values(found.per_head) == values(known.per_head)
    assert values(found.per_layer) == values(known.per_layer)
    assert int((found.per_head == known.per_head).sum()) < 6, "of 24"
    assert values(found.per_head[0]) != values(known.per_head[0]), "over layers too"
    assert not torch.equal(found.per_layer, known.per_layer)


def test_seeds_give_other_places():
    first, same, other = (ShuffledEstimator(seed=seed).estimate(PROBE).per_head for seed in (3, 3, 4))
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_every_place_is_equally_likely():
    probe, counts = SyntheticProbe(num_layers=3, num_kv_heads=2, lengths=(5,)), [0] * 6
    known = CosineEstimator().estimate(probe).per_head.flatten().tolist()
    for seed in range(300):
        counts[known.index(float(ShuffledEstimator(seed=seed).estimate(probe).per_head[0, 0]))] += 1
    assert sum((count - 50) ** 2 / 50 for count in counts) < 20.5, "chi-square, 5 degrees, p = 0.001"


def test_curves_move_with_their_heads(monkeypatch):
    per_head = torch.arange(24.0).reshape(6, 4)
    curves = torch.stack([per_head, per_head + 100], -1)

    class Curves:
        def estimate(self, probe):
            return Importance(per_head, curves=curves, curve_capacities=torch.tensor([8, 16]))

    monkeypatch.setattr(kvpolicy.registry, "create", lambda role, name, params: Curves())
    found = ShuffledEstimator().estimate(PROBE)
    assert found.per_layer is None and found.curve_capacities.tolist() == [8, 16]
    assert torch.equal(found.curves, torch.stack([found.per_head, found.per_head + 100], -1))
    assert not torch.equal(found.per_head, per_head)


def test_an_unknown_estimator_or_parameter_is_refused():
    with pytest.raises(PluginError, match="no estimator named 'cosin'"):
        ShuffledEstimator(estimator="cosin").estimate(PROBE)
    with pytest.raises(PluginError, match="no parameter 'mas'"):
        ShuffledEstimator(estimator="entropy", estimator_params={"mas": 0.5}).estimate(PROBE)
