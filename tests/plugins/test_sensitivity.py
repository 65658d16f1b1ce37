import pytest
import torch
from kvpolicy_baselines.retrieval import RetrievalEstimator
from kvpolicy_baselines.sensitivity import SensitivityEstimator
from kvpolicy_baselines.shuffled import ShuffledEstimator

from kvpolicy import PluginError, TransformersProbe
from kvpolicy.testing import SyntheticProbe, check_estimator
from tests.tiny import tiny_ids, tiny_model


class Drawn(SyntheticProbe):
    """Losses drawn at random, others for every table; keeps the tables that it was asked for."""

    def __init__(self, layers=2, heads=3):
        super().__init__(num_layers=layers, num_q_heads=heads, num_kv_heads=heads)
        self.asked = []

    def loss(self, capacities):
        key = tuple(capacities.flatten().tolist())
        self.asked.append(key)
        return self.of(key)

    def of(self, key):
        generator = torch.Generator().manual_seed(hash(key) % 2**31)
        return 2 + torch.rand(2, generator=generator, dtype=torch.float64)


def shrunk(probe, positions, size):
    """The flat table with the KV heads at these flat positions shrunk."""
    layers, heads = probe.spec.table_shape
    return tuple(size if i in positions else 64 for i in range(layers * heads))


def mean(losses):
    first, second = losses.tolist()
    return (first + second) / 2


def test_laws():
    check_estimator(SensitivityEstimator)
    check_estimator(SensitivityEstimator(sizes=(0.5,), size=0.5, max_groups=1))
    check_estimator(ShuffledEstimator(estimator="sensitivity"))


def test_every_head_at_every_size_alone():
    probe = Drawn()
    found = SensitivityEstimator(sizes=(0.5, 0.125, 0.25), size=0.25).estimate(probe)
    full = mean(probe.of((64,) * 6))
    assert found.curve_capacities.tolist() == [8, 16, 32, 64]
    increases = []
    for head in range(6):
        measured = [mean(probe.of(shrunk(probe, [head], size))) for size in (8, 16, 32)]
        assert found.curves.flatten(0, 1)[head].tolist() == pytest.approx([*measured, full])
        increases.append(measured[1] - full)
    assert min(increases) < 0 < max(increases), "both are seen"
    assert found.per_head.flatten().tolist() == pytest.approx([max(0, x) for x in increases], abs=1e-6)
    assert len(probe.asked) == len(set(probe.asked)) == 1 + 6 * 3, "nothing is measured twice"


@pytest.mark.parametrize(("max_groups", "width"), [(10, 1), (9, 2), (6, 2), (5, 3), (4, 3), (2, 5), (1, 5)])
def test_above_the_limit_neighbours_are_shrunk_together(max_groups, width):
    probe = Drawn(layers=2, heads=5)
    estimator = SensitivityEstimator(sizes=(0.25,), size=0.25, max_groups=max_groups)
    found, full = estimator.estimate(probe), mean(probe.of((64,) * 10))
    groups = [
        [layer * 5 + head for head in range(first, min(first + width, 5))]
        for layer in (0, 1)
        for first in range(0, 5, width)
    ]
    assert probe.asked[1:] == [shrunk(probe, group, 16) for group in groups]
    for group in groups:
        expected = (mean(probe.of(shrunk(probe, group, 16))) - full) / len(group)
        for head in group:
            assert float(found.curves.flatten(0, 1)[head, 0]) == pytest.approx(full + expected)
            assert float(found.per_head.flatten()[head]) == pytest.approx(max(0, expected), abs=1e-6)
    assert estimator.num_forwards(probe.spec, prompts=9, sequences=2) == 2 * len(probe.asked)


def test_a_model_with_256_heads_is_measured_head_by_head_and_one_with_more_is_not():
    estimator = SensitivityEstimator()
    for layers, heads, groups in ((32, 8, 256), (48, 8, 192), (80, 8, 240), (300, 8, 300)):
        spec = SyntheticProbe(num_layers=layers, num_q_heads=heads, num_kv_heads=heads).spec
        assert estimator.num_forwards(spec, prompts=6, sequences=4) == 4 * (1 + 3 * groups)


def test_sizes_are_never_below_what_the_probe_takes_and_measured_once():
    probe = Drawn()
    found = SensitivityEstimator(sizes=(0.01, 0.02, 0.5), size=0.02).estimate(probe)
    assert found.curve_capacities.tolist() == [5, 32, 64]
    assert len(probe.asked) == 1 + 6 * 2
    full = mean(probe.of((64,) * 6))
    first = mean(probe.of(shrunk(probe, [0], 5))) - full
    assert float(found.per_head[0, 0]) == pytest.approx(max(0, first), abs=1e-6)


def test_a_model_of_one_kv_head_is_its_loss_under_that_capacity():
    model, ids = tiny_model("Llama", layers=1, num_kv_heads=1), tiny_ids(64, batch=3)
    probe = TransformersProbe(model, ids, num_sink_tokens=4)
    assert probe.least_capacity == 5
    found = SensitivityEstimator().estimate(probe)
    assert found.curve_capacities.tolist() == [5, 8, 32, 64]
    losses = []
    for capacity in (5, 8, 32, 64):  # token by token: what each one sees is cut out of the sequence by a mask
        q, k = torch.arange(64)[:, None], torch.arange(64)
        seen = (k <= q) & ((k < 4) | (k > q - (capacity - 4)))
        mask = torch.zeros(64, 64).masked_fill(~seen, float("-inf"))[None, None].expand(3, 1, -1, -1)
        with torch.no_grad():
            logits = model(ids, attention_mask=mask, use_cache=False).logits[:, :-1].log_softmax(-1)
        losses.append(-float(logits.gather(2, ids[:, 1:, None])[:, 15:].double().mean()))
    assert found.curves[0, 0].tolist() == pytest.approx(losses, abs=1e-5)
    assert float(found.per_head) == pytest.approx(max(0, losses[1] - losses[3]), abs=1e-5)


def test_estimators_that_run_more_or_ask_another_say_so():
    spec = SyntheticProbe().spec
    assert RetrievalEstimator(depths=5).num_forwards(spec, prompts=6, sequences=4) == 30
    assert ShuffledEstimator().num_forwards(spec, prompts=6, sequences=4) == 6
    shuffled = ShuffledEstimator(estimator="sensitivity", estimator_params={"sizes": [0.125]})
    assert shuffled.num_forwards(spec, prompts=6, sequences=4) == 4 * (1 + 6)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"sizes": ()}, r"size one of them, got \[\]"),
        ({"sizes": (0.0, 0.125)}, "sizes must be parts of the context"),
        ({"sizes": (0.125, 1.0)}, "sizes must be parts of the context"),
        ({"size": 0.3}, "and 0.3"),
        ({"max_groups": 0}, "max_groups must be at least 1, got 0"),
    ],
)
def test_bad_parameters_are_refused(bad, message):
    with pytest.raises(PluginError, match=f"sensitivity: .*{message}"):
        SensitivityEstimator(**bad)
