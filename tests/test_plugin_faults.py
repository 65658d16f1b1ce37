"""A fault in a plugin, wherever it is, is one error that says whose it is and what came."""

import optuna
import pytest
import torch
from torch import Tensor

from kvpolicy import Budget, EvictionPolicy, Importance, LayerActivations, ModelError, PluginError, registry
from kvpolicy.budget.ask import Ask
from kvpolicy.cache.schedule import from_allocator
from kvpolicy.plugins import plugin_call
from kvpolicy.plugins.faults import PluginFault, contained
from kvpolicy.progress import Progress
from kvpolicy.testing import SyntheticProbe
from kvpolicy.tuning.fit import fitted_shares
from kvpolicy.tuning.study_notes import StudyNotes
from tests.cache.play import spec_of, store_of, tensors
from tests.faulty_plugin import FAULTS, Allocator, Estimator, Learning, Policy, offer

BUDGET = Budget(total=40, shape=(3, 2), floor=2, ceiling=20)
ONES = Importance(torch.ones(3, 2), torch.ones(3))


def stepped(policy):
    store = store_of(policy, [5, 6])
    store.prefill(0, *tensors(9))
    store.decode(0, *tensors(1))


CALLS = {
    "num_forwards": lambda how: plugin_call.num_forwards(
        Estimator("num_forwards", how), SyntheticProbe().spec, prompts=2, sequences=1
    ),
    "estimate": lambda how: plugin_call.importance(Estimator("estimate", how), SyntheticProbe()),
    "token_maps": lambda how: plugin_call.token_maps(Estimator("token_maps", how), SyntheticProbe()),
    "shares": lambda how: from_allocator(Allocator("shares", how), Policy(), spec_of(2, 2), Ask(retention=0.5)),
    "fit": lambda how: plugin_call.learned_shares(Learning("fit", how), SyntheticProbe(), ONES, BUDGET),
    "split": lambda how: plugin_call.split_shares(Allocator("split", how), [torch.ones(2, 2, 9)] * 3, BUDGET),
    "params": lambda how: plugin_call.params_of(Policy(where="params", how=how)),
    "score_prompt": lambda how: store_of(Policy(where="score_prompt", how=how), [5, 6]).prefill(0, *tensors(9)),
    "score_step": lambda how: stepped(Policy(where="score_step", how=how)),
}
"""Every method that the core calls, each through what calls it or its one door."""

REAL = ["none", "list", "meta", "complex", "shape"]
PROPORTIONS = [*REAL, "sparse", "nan", "inf", "negative"]
ANSWERS = {
    "num_forwards": ["none"],
    "estimate": ["none", "meta", "complex", "shape", "nan", "inf", "negative", "one head"],
    "token_maps": [*REAL, "nan"],
    "shares": [*PROPORTIONS, "zero"],
    "fit": [*REAL[1:], "sparse", "nan", "inf", "negative", "zero"],
    "split": PROPORTIONS,
    "params": ["none"],
    "score_prompt": [*REAL, "sparse", "double", "nan"],
    "score_step": [*REAL, "sparse", "double", "nan"],
}


@pytest.mark.parametrize("method", CALLS)
@pytest.mark.parametrize("how", [how for how in FAULTS if how != "interrupt"])
def test_whatever_is_thrown_is_one_error_that_names_its_method(method, how):
    with pytest.raises(PluginError) as caught:
        CALLS[method](how)
    said = {"exit": "raised SystemExit: 0 (faulty_plugin.py:", "value": "raised ValueError: two lines (faulty_plugin"}
    said |= {"generator": "raised GeneratorExit", "stop": "raised StopIteration", "odd": "raised Odd"}
    assert f".{method} {said.get(how, 'refuses: not today')}" in str(caught.value)
    assert "which is not registered" in str(caught.value) and "\n" not in str(caught.value)
    assert type(caught.value.__cause__) is type(FAULTS[how]())


@pytest.mark.parametrize("method", CALLS)
def test_ctrl_c_goes_through(method):
    with pytest.raises(KeyboardInterrupt):
        CALLS[method]("interrupt")


@pytest.mark.parametrize(("method", "how"), [(method, how) for method, hows in ANSWERS.items() for how in hows])
def test_whatever_is_returned_is_checked(method, how):
    with pytest.raises(PluginError, match=rf"\.{method}\b") as caught:
        CALLS[method](how)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("method", "how", "said"),
    [
        ("estimate", "one head", r"returned torch.float32 of shape \(1, 1\), expected an Importance of .* \(3, 2\)$"),
        ("shares", "nan", r"returned nan at \[0, 0\], expected shares that are finite and >= 0$"),
        ("fit", "negative", r"returned -999999.0 at \[0, 0\], expected shares that are finite and >= 0$"),
        ("shares", "zero", "returned all of it 0, expected a share above 0 for at least one KV head$"),
        ("score_prompt", "list", r"returned a list, expected float32 of shape \(1, 2, 9\)$"),
        ("score_step", "meta", r"without values \(meta\), expected float32 of shape \(11,\)$"),
    ],
)
def test_it_says_what_came_and_what_was_expected(method, how, said):
    with pytest.raises(PluginError, match=said):
        CALLS[method](how)


def test_a_registered_plugin_is_named_with_its_distribution(tmp_path, monkeypatch):
    offer(tmp_path, monkeypatch)
    for role, plugin in {"policy": Policy(), "allocator": Allocator(), "estimator": Estimator()}.items():
        assert registry.whose(plugin) == registry.whose(type(plugin)) == f"{role} 'faulty' of acme 1.2"
    with pytest.raises(PluginError, match=r"^policy 'faulty' of acme 1.2: Policy.score_prompt raised SystemExit: 0 "):
        CALLS["score_prompt"]("exit")
    with pytest.raises(PluginError, match=r"^policy 'faulty' of acme 1.2: Policy refuses .*SystemExit: 0") as caught:
        registry.create("policy", "faulty", {"where": "__post_init__"})
    assert type(caught.value) is PluginError and type(caught.value.__cause__) is SystemExit
    with pytest.raises(PluginError, match=r"^policy 'unmakeable' of acme 1.2 cannot be used: .* raises SystemExit: 0"):
        registry.get("policy", "unmakeable")
    statuses = {row.name: row.status for row in registry.rows() if row.distribution == "acme"}
    assert statuses == {"faulty": "ok", "unmakeable": "broken", "leaving": "ok"}


def test_what_is_no_plugins_fault_keeps_its_name():
    with pytest.raises(ModelError, match=r"^the model$"), contained("policy 'x' of acme 1.2"):
        raise ModelError("the model")
    with (
        pytest.raises(PluginFault, match=r"^policy 'y': ValueError: inner$"),
        contained("policy 'x'"),
        contained("policy 'y'"),
    ):
        raise ValueError("inner")


@pytest.mark.parametrize("stored", [float("nan"), float("inf"), -1.0, 0.0])
def test_what_was_learned_before_is_checked_as_what_is_learned_now(stored):
    notes = StudyNotes(optuna.create_study())
    kept = [[0.5, 0.5]] * 3
    for shares in (kept, [[stored, stored], *kept[1:]] if stored else [[0.0, 0.0]] * 3):
        notes.keep_fitted_shares(torch.tensor(shares))
        if shares == kept:
            assert fitted_shares(Learning(), SyntheticProbe(), ONES, BUDGET, notes, Progress()).tolist() == kept
    with pytest.raises(PluginError, match=r"Learning.fit returned .*, expected .*shares? "):
        fitted_shares(Learning(), SyntheticProbe(), ONES, BUDGET, notes, Progress())


def test_an_allocator_that_writes_into_its_arguments_writes_into_its_own(monkeypatch):
    importance, floor = Importance(torch.ones(3, 2), torch.ones(3)), torch.full((3, 2), 2)
    budget = Budget(total=40, shape=(3, 2), floor=floor, ceiling=20)

    def shares(_, importance, budget):
        importance.per_head.zero_()
        budget.floor.zero_()
        return torch.ones(budget.shape)

    monkeypatch.setattr(Allocator, "shares", shares)
    plugin_call.shares(Allocator(), importance, budget)
    assert bool((importance.per_head == 1).all()) and bool((floor == 2).all())


def test_a_source_that_is_not_listed_cannot_be_read() -> None:
    keys = torch.ones(1, 1, 2, 4)
    activations = LayerActivations(layer=0, keys=keys)
    assert activations.keys is keys and repr(activations) == "LayerActivations(layer, keys)"
    with pytest.raises(PluginError, match="nobody supplied 'values': list it in `requires`"):
        activations.values  # noqa: B018
    changed = activations.replace(values=2 * keys)
    assert changed.supplied() == {"layer": 0, "keys": keys, "values": changed.values}


def test_a_policy_that_reads_what_it_did_not_list_is_named() -> None:
    class Forgetful(EvictionPolicy):
        def score_prompt(self, activations: LayerActivations) -> Tensor:
            return activations.keys.norm(dim=-1)

    with pytest.raises(PluginError, match=r"Forgetful\.score_prompt refuses: nobody supplied 'keys': list it in"):
        plugin_call.prompt_scores(Forgetful(), LayerActivations(layer=0), (1, 1, 2), torch.device("cpu"))
