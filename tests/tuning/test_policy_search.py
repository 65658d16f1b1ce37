"""A policy whose parameters are searched: once, before the levels, and as well kept as those are."""

import json
from collections import Counter
from dataclasses import dataclass, replace
from typing import ClassVar

import optuna
import pytest
import torch

from kvpolicy import EvictionPolicy, PluginError, PromptProbe, StudyError
from kvpolicy.tuning import search_policy, trial_count, trials, tune
from kvpolicy.tuning.storage import open_storage
from tests.tiny import tiny_model
from tests.tuning.searches import (
    Notes,
    OneHead,
    interrupt,
    make_corpus,
    make_settings,
    points,
    run,
    states,
    the_study,
)

BEST = 9
"""The depth with the lowest loss, where losses are made up."""


@dataclass(frozen=True, slots=True)
class Deep(EvictionPolicy):
    """Keeps what is near `depth`."""

    requires: ClassVar[frozenset[str]] = frozenset({"positions"})
    depth: int = 30
    num_sink_tokens: int = 4

    def score_prompt(self, activations):
        return -(activations.positions - self.depth).abs().float()

    @classmethod
    def suggest(cls, trial):
        return cls(depth=trial.suggest_int("depth", 0, 40))


@dataclass(frozen=True, slots=True)
class Plain(Deep):
    @classmethod
    def suggest(cls, trial):
        return cls()


def with_suggest(function):
    return type("Deep", (Deep,), {"suggest": classmethod(function)})


@pytest.fixture
def made_up(monkeypatch):
    """Losses grow with the distance from the best depth. The depths that were measured, in a Counter."""
    measured = Counter()

    def losses(self, capacities):
        measured[self.policy.depth] += 1
        for index in range(len(self.sequences)):
            noise = torch.rand(1, 32, generator=torch.Generator().manual_seed(index))
            yield 3 + abs(self.policy.depth - BEST) / 10 + 0.01 * noise

    monkeypatch.setattr(PromptProbe, "token_losses", losses)
    return measured


def policy_study(settings):
    storage = open_storage(settings.storage)
    names = [study.study_name for study in storage.get_all_studies() if "-policy-" in study.study_name]
    return optuna.load_study(study_name=names[-1], storage=storage) if names else None


def settings_for(tmp_path, policy, **changes):
    return make_settings(tmp_path, **{"policy": policy, "retentions": (0.4, 0.3), "trials": 6, **changes})


def run_noted(settings):
    notes = Notes()
    return tune(tiny_model("Llama", layers=2), make_corpus(), settings, progress=notes), notes.said


def test_the_better_parameter_is_found_and_everything_after_uses_it(tmp_path, made_up, offered):
    settings = settings_for(tmp_path, offered(Deep), allocator=offered(OneHead), trials=4)
    plan, said = run_noted(settings)
    study = policy_study(settings)
    tried = points(study)
    found = min((point["depth"] for point in tried), key=lambda depth: abs(depth - BEST))
    assert tried[0] == {"depth": 30} and len(tried) == 4, "the defaults come first"
    assert abs(found - BEST) < 30 - BEST
    assert plan.method.policy.params == {"depth": found, "num_sink_tokens": 4}
    assert plan.provenance["policy_search"]["retention"] == 0.3 and plan.provenance["policy_search"]["trials"] == 4
    assert plan.provenance["policy_search"]["excess"] == pytest.approx((abs(found - BEST) - 21) / 10)
    for retention in settings.retentions:
        level = the_study(settings, retention)
        assert level.user_attrs["kvpolicy_settings"]["policy"]["params"]["depth"] == found
    assert set(made_up) == {30, *(point["depth"] for point in tried)}
    about = [line for line in said if "of the policy" in line or "policy 'deep' gets" in line]
    assert about[1].endswith("depth of the policy 'deep', under uniform budgets at 30%")
    assert about[2].startswith(f"the policy 'deep' gets depth={found}: -")
    # trials and uniform of each level; held out; their prompts, and those to profile; then what the policy takes:
    # its defaults, each trial, and for all but the defaults and for what is found a run of the four prompts
    forwards = 2 * (4 + 1) * 4 + 5 * 8 + 8 + 6 + (4 + 1) * 4 + 4 * 4
    assert "4 trials of the policy 'deep', 2 levels x 4" in about[0] and f"at most {forwards} forwards" in about[0]


def test_the_defaults_are_kept_where_nothing_beats_them(tmp_path, made_up, offered):
    deep = dataclass(frozen=True)(type("Deep", (Deep,), {"__annotations__": {"depth": int}, "depth": BEST}))
    plan, said = run_noted(settings_for(tmp_path, offered(deep), retentions=(0.3,), trials=3))
    assert plan.method.policy.params["depth"] == BEST
    assert plan.provenance["policy_search"]["excess"] == 0
    assert any("'deep' keeps its defaults: nothing that was tried is better at 30%" in line for line in said)


@pytest.mark.parametrize(("policy", "params"), [(Deep, {"num_sink_tokens": 4}), (Plain, None)])
def test_a_parameter_that_is_given_and_a_policy_that_asks_for_none_are_not_searched(
    tmp_path, made_up, offered, policy, params
):
    settings = settings_for(tmp_path, offered(policy), policy_params=params, trials=1)
    plan, said = run_noted(settings)
    assert policy_study(settings) is None and set(made_up) == {30}
    assert "policy_search" not in plan.provenance and plan.method.policy.params["depth"] == 30
    assert "policy_space" not in the_study(settings).user_attrs["kvpolicy_settings"]
    assert not any("policy" in line for line in said)


def test_an_interruption_loses_at_most_the_running_trial(tmp_path, monkeypatch, made_up, offered):
    settings = settings_for(tmp_path, offered(Deep), allocator=offered(OneHead), retentions=(0.4,), trials=3)
    interrupt(monkeypatch, settings, 2)
    assert states(policy_study(settings)) == ["COMPLETE", "FAIL"]
    lost = policy_study(settings).trials[1].params
    interrupt(monkeypatch, replace(settings, resume=True), 2 + 2)
    found = points(policy_study(settings))
    assert lost in found and len(found) == 3, "the interrupted point is run again"
    assert states(the_study(settings)) == ["COMPLETE", "FAIL"]
    depth = the_study(settings).user_attrs["kvpolicy_settings"]["policy"]["params"]["depth"]
    made_up.clear()
    plan = run(replace(settings, resume=True))
    assert set(made_up) == {depth} == {plan.method.policy.params["depth"]}, "the policy's search is over"
    assert abs(depth - BEST) == min(abs(point["depth"] - BEST) for point in found)
    assert states(the_study(settings)).count("COMPLETE") == 3


def test_a_search_that_has_ended_stays_so(tmp_path, monkeypatch, made_up, offered):
    settings = settings_for(tmp_path, offered(Deep), allocator="uniform", retentions=(0.4,), trials=3)
    plan = run(settings)
    monkeypatch.setattr(search_policy, "run_trials", lambda *_, **__: pytest.fail("searched"))
    again, said = run_noted(replace(settings, resume=True, trials=4))
    assert again.method == plan.method and len(points(the_study(settings))) == 4
    assert again.provenance["policy_search"] == plan.provenance["policy_search"]
    assert not any("trials of the policy" in line or "searched first" in line for line in said)


def test_of_two_processes_the_first_says_what_the_search_has_come_to():
    study = optuna.create_study()
    assert trials.outcome_of(study) is None
    assert trials.end(study, {"params": {"depth": 1}}) == {"params": {"depth": 1}}
    assert trials.end(study, {"params": {"depth": 2}}) == {"params": {"depth": 1}}
    assert trials.places_in_use(study) == 0
    assert trials.begin(study, {"x": 0.5}, 1).suggest_float("x", 0, 1) == 0.5


def test_a_resume_without_the_parameter_that_was_given_is_refused_by_name(tmp_path, made_up, offered):
    settings = settings_for(tmp_path, offered(Deep), policy_params={"depth": 3}, trials=1)
    run(settings)
    made_up.clear()
    with pytest.raises(StudyError, match=r'policy was .*"depth": 3.*policy_space was null, now \{"depth": "IntDist'):
        run(replace(settings, policy_params=None, resume=True))
    assert not made_up, "before any work"


def test_the_policy_has_trials_where_the_allocator_draws_nothing(tmp_path, monkeypatch, made_up, offered):
    monkeypatch.setattr(trial_count, "SEARCH_SECONDS", 0.0)
    monkeypatch.setattr(trial_count, "LEAST_TRIALS", 3)
    settings = settings_for(tmp_path, offered(Deep), allocator="uniform", trials=None)
    plan = run(settings)
    assert (plan.provenance["trials"], plan.provenance["policy_search"]["trials"]) == (1, 3)
    assert len(points(policy_study(settings))) == 3 and len(points(the_study(settings))) == 1
    shared = plan.provenance["calibration"][0]
    assert shared["retention"] is None and json.dumps(plan.provenance)


def test_losses_of_the_model_itself_are_searched_by(tmp_path, offered):
    settings = settings_for(tmp_path, offered(Deep), trials=2, retentions=(0.4,), objective="perplexity")
    plan = run(settings)
    assert policy_study(settings).trials[0].value == 0, "the defaults against themselves"
    uniform = run(settings_for(tmp_path, "deep", policy_params=plan.method.policy.params, retentions=(0.4,), trials=1))
    assert plan.levels[0].perplexity["heldout_uniform"] == uniform.levels[0].perplexity["heldout_uniform"]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda cls, trial: 1 / 0, "Deep.suggest raised ZeroDivisionError"),
        (lambda cls, trial: None, "Deep.suggest returned None, expected a Deep"),
        (lambda cls, trial: Plain(trial.suggest_int("depth", 0, 40)), "Deep.suggest returned a Plain, expected a Deep"),
        (lambda cls, trial: cls(num_sink_tokens=-trial.suggest_int("depth", 1, 40)), "`num_sink_tokens` is -"),
    ],
)
def test_a_broken_suggest_is_one_line_that_names_the_method(tmp_path, offered, function, message):
    with pytest.raises(PluginError, match=message) as raised:
        run(settings_for(tmp_path, offered(with_suggest(function), "deep")))
    assert "\n" not in str(raised.value)


def test_a_policy_that_is_a_window_rule_only_sometimes_is_refused(tmp_path, made_up, offered):
    class Sometimes(Deep):
        @property
        def window_rule(self):
            return self.depth != 30

    with pytest.raises(PluginError, match="'sometimes' is a window rule with some of its parameters and none with"):
        run(settings_for(tmp_path, offered(Sometimes), trials=3))
