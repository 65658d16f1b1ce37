"""Learned windows: the gradient, a planted truth, exact totals, and what a search makes of them."""

import json
import math

import pytest
import torch
from kvpolicy_baselines.learned import LearnedAllocator

from kvpolicy import Budget, Importance, ModelProbe, PluginError, TransformersProbe, apportion, load_plan, new_cache
from kvpolicy.progress import Progress
from kvpolicy.testing import SyntheticProbe, check_allocator
from tests.command_line import FAST
from tests.tiny import tiny_ids, tiny_model

SHAPE = (2, 2)
ANY = Importance(torch.ones(SHAPE))
CONTEXT = 96


def budget(total, floor=5):
    return Budget(total, SHAPE, floor, CONTEXT)


def probe_of(model, **options):
    return TransformersProbe(model, tiny_ids(CONTEXT, 2), **options)


def test_laws():
    check_allocator(LearnedAllocator(steps=3))
    check_allocator(LearnedAllocator(steps=1, tau_start=0.1, tau_end=0.1, seed=-1))


def test_a_budget_in_bytes_is_spent_whole():
    cost = torch.tensor([[4, 4], [1, 1]])
    probe, own = Biases(), Budget(900, SHAPE, 5, CONTEXT, cost)
    found = LearnedAllocator(steps=2).fit(probe, ANY, own)
    assert float((found * cost).sum()) == pytest.approx(900)
    assert float(found[1].min()) > 2 * float(found[0].max()), "entries that cost less are more"


class Biases:
    """Keeps every bias that a fit asks for."""

    num_sequences, num_sink_tokens, progress = 3, 4, Progress()

    def __init__(self):
        self.seen, self.order, self.states = [], [], []

    def saved(self):
        return self.states[-1] if self.states else None

    def save(self, state):
        self.states.append(json.loads(json.dumps(state)))

    def soft_loss(self, bias, target, *, sequence):
        assert target == "full"
        positions = torch.arange(CONTEXT)
        rank = (positions[:, None] - positions).clamp(min=0)
        rank[:, :4] = -1
        self.seen.append(torch.stack([bias(layer, rank[None]) for layer in range(2)]))
        self.order.append(sequence)
        loss = (self.seen[-1][0, 0, -1].exp().sum() * -0.01)[None]
        self.seen[-1] = self.seen[-1].detach()
        return loss


def test_the_bias_is_the_formula_from_uniform_on_and_hardens():
    probe = Biases()
    LearnedAllocator(steps=5, tau_start=0.4, tau_end=0.1).fit(probe, ANY, budget(4 * 24))
    window = 24 - 4
    for q, k in ((90, 88), (90, 70), (90, 40), (50, 4), (90, 3), (2, 0)):
        expected = 0.0 if k < 4 else -math.log1p(math.exp(-(math.log(window + 0.5) - math.log(q - k + 1)) / 0.4))
        assert float(probe.seen[0][1, 0, q, k]) == pytest.approx(expected, abs=1e-5)
    # far beyond the window the bias is a line in log distance, of slope 1 / tau
    slopes = [float((x[1, 1, 90, 80] - x[1, 1, 90, 4]) / (math.log(87) - math.log(11))) for x in probe.seen]
    assert slopes == sorted(slopes), "the edge gets steeper with each step"
    far = [float((x[1, 1, 90, 9] - x[1, 1, 90, 4]) / (math.log(87) - math.log(82))) for x in probe.seen]
    assert far[0] == pytest.approx(1 / 0.4, rel=0.05) and far[-1] == pytest.approx(1 / 0.1, rel=0.01)


def test_a_narrow_edge_is_the_window_rule():
    probe = Biases()
    LearnedAllocator(steps=1, tau_start=1e-3, tau_end=1e-3).fit(probe, ANY, budget(4 * 24))
    weight = probe.seen[0].exp()[0, 0]
    for q in (30, 60, 95):
        visible = [k < 4 or q - k < 20 for k in range(q + 1)]
        assert weight[q, : q + 1].tolist() == pytest.approx([float(x) for x in visible], abs=1e-6)


def test_it_can_start_from_an_importance():
    probe, importance = Biases(), Importance(torch.tensor([[1.0, 4.0], [0.0, 2.0]]))
    LearnedAllocator(steps=1, start_exponent=0.5).fit(probe, importance, budget(4 * 24))
    shares = torch.tensor([[1 / 4, 1.0], [0.02, 2 / 4]]).sqrt()
    kept = 5 + (4 * 24 - 4 * 5) * shares / shares.sum() - 4
    for layer, head in ((0, 0), (0, 1), (1, 0), (1, 1)):
        expected = -math.log1p(math.exp(-(math.log(float(kept[layer, head]) + 0.5) - math.log(61)) / 0.35))
        assert float(probe.seen[0][layer, head, 90, 30]) == pytest.approx(expected, abs=1e-4)
    again = Biases()
    LearnedAllocator(steps=1, start_exponent=3.0).fit(again, Importance(torch.zeros(SHAPE)), budget(4 * 24))
    assert torch.equal(again.seen[0][0, 0], again.seen[0][1, 1]), "where nothing was measured it starts from uniform"


def test_each_round_sees_every_sequence_once():
    probe = Biases()
    LearnedAllocator(steps=8).fit(probe, ANY, budget(4 * 24))
    assert sorted(probe.order[:3]) == sorted(probe.order[3:6]) == [0, 1, 2]
    assert len(set(probe.order[6:])) == 2


@pytest.mark.parametrize("total", [4 * 6 + 1, 4 * 29, 4 * CONTEXT])
def test_totals_and_floors(total):
    shares = LearnedAllocator(steps=4, learning_rate=1.0).fit(
        probe_of(tiny_model("Llama", layers=2)), ANY, budget(total)
    )
    assert float(shares.sum()) == pytest.approx(total) and float(shares.min()) >= 5
    assert int(apportion(shares, budget(total)).sum()) == total


def test_floors_that_take_everything_leave_them():
    shares = LearnedAllocator(steps=2).fit(probe_of(tiny_model("Llama", layers=2)), ANY, budget(4 * 5))
    assert torch.equal(shares, torch.full(SHAPE, 5.0, dtype=torch.float64))


@pytest.mark.parametrize("dead", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_a_head_that_nothing_reads_falls_to_the_floor(dead):
    model = tiny_model("Llama", layers=2)
    layer, head = dead
    with torch.no_grad():
        model.model.layers[layer].self_attn.o_proj.weight.unflatten(1, (2, -1))[:, head] = 0
    given = budget(4 * CONTEXT * 3 // 10)
    shares = LearnedAllocator(steps=25, learning_rate=0.3).fit(probe_of(model), ANY, given)
    others = [float(shares[i, j]) for i in range(2) for j in range(2) if (i, j) != dead]
    assert float(shares[dead]) < 8 and min(others) > float(shares[dead])
    assert float(shares[dead]) < given.uniform_capacity / 3


@pytest.mark.parametrize("stopped", [4, 7, 12])
def test_an_interrupted_run_goes_on_where_it_was_kept_and_ends_the_same(stopped):
    """Bit by bit, through JSON."""

    class Stopping(TransformersProbe):
        states, calls, most = (), 0, 10**9

        def saved(self):
            return json.loads(self.states[-1]) if self.states else None

        def save(self, state):
            self.states = (*self.states, json.dumps(state))

        def soft_loss(self, *args, **options):
            self.calls += 1
            if self.calls > self.most:
                raise KeyboardInterrupt
            return super().soft_loss(*args, **options)

    model, learned = tiny_model("Llama", layers=2), LearnedAllocator(steps=12, learning_rate=0.3)
    straight = learned.fit(Stopping(model, tiny_ids(CONTEXT, 2)), ANY, budget(120))
    probe = Stopping(model, tiny_ids(CONTEXT, 2))
    probe.most = stopped
    if stopped < 12:
        with pytest.raises(KeyboardInterrupt):
            learned.fit(probe, ANY, budget(120))
    else:
        learned.fit(probe, ANY, budget(120))
    probe.most, probe.calls = 10**9, 0
    assert torch.equal(learned.fit(probe, ANY, budget(120)), straight)
    assert probe.calls == 12 - stopped // 5 * 5


def test_the_model_and_the_callers_gradient_mode_are_left_alone():
    model = tiny_model("Llama", layers=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        first = LearnedAllocator(steps=2).fit(probe_of(model), ANY, budget(120))
        assert not torch.is_grad_enabled()
    assert torch.equal(first, LearnedAllocator(steps=2).fit(probe_of(model), ANY, budget(120)))
    assert not first.requires_grad
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_steps_cost_and_convergence_are_told():
    told = []

    class Telling(Progress):
        def note(self, message):
            told.append(message)

        def begin(self, stage, total):
            told.append((stage, total))

        def advance(self, detail=""):
            told.append(detail)

        def end(self):
            told.append("end")

    LearnedAllocator(steps=3).fit(probe_of(tiny_model("Llama", layers=2), progress=Telling()), ANY, budget(120))
    assert told[0] == ("learn capacities", 3) and told[4] == "end"
    assert [line.split(",")[0] for line in told[1:4]] == ["step 1/3", "step 2/3", "step 3/3"]
    assert told[5].startswith("learned capacities in 3 steps") and "divergence from the full cache" in told[5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be >= 1"),
        ({"learning_rate": 0.0}, "learning_rate > 0"),
        ({"start_exponent": math.inf}, "start_exponent must be finite, got inf"),
        ({"tau_end": 0.0}, "tau_start >= tau_end > 0, got 0.35 and 0.0"),
        ({"tau_start": 0.01}, "tau_start >= tau_end"),
    ],
)
def test_bad_parameters_are_refused(changes, message):
    with pytest.raises(PluginError, match=message):
        LearnedAllocator(**changes)


def test_without_a_model_there_are_no_shares():
    with pytest.raises(PluginError, match="kvpolicy tune --allocator learned"):
        new_cache(tiny_model("Llama", layers=2), policy="streaming", allocator="learned", retention=0.5)


def test_a_divergence_that_is_not_finite_is_refused():
    model = tiny_model("Llama", layers=2)
    with torch.no_grad():
        model.lm_head.weight[5] = math.nan
    with pytest.raises(PluginError, match="divergence from the full cache is nan at step 1"):
        LearnedAllocator(steps=2).fit(probe_of(model), ANY, budget(120))


def test_a_probe_without_soft_loss_is_refused_by_name():
    class Measuring(SyntheticProbe):
        num_sequences = ModelProbe.num_sequences  # the default

    with pytest.raises(PluginError, match="Measuring has no soft_loss"):
        LearnedAllocator(steps=2).fit(Measuring(), ANY, budget(120))


# --- tune


@pytest.mark.parametrize("policy", ["streaming", "h2o"])
def test_tune_learns_and_writes_a_plan(kvpolicy, tiny_checkpoint, tiny_text, tmp_path, policy):
    options = ["--allocator", "learned", "--allocator-param", "steps=3", "--retention", "0.5", "--trials", "2"]
    options += ["--policy", policy]
    where = ["--model", tiny_checkpoint, "--text", tiny_text, "--out", tmp_path / "plan.json"]
    done = kvpolicy("tune", *where, *FAST, *options)
    assert done.code == 0
    assert done.err.count("learned capacities in 3 steps") == 1
    plan = load_plan(tmp_path / "plan.json")
    level = plan.levels[0]
    assert plan.method.allocator.name == "learned" and plan.provenance["trials"] == 1
    beat = level.comparison["verdict"] != "uniform kept: no trial beat it"
    assert level.allocator_params.get("steps") == (3 if beat else None)
    assert int(plan.capacities(context_length=64, retention=level.retention).sum()) == round(level.retention * 64 * 4)
