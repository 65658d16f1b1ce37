"""The three plugins of a search are looked up once, and refused before any work where they cannot serve."""

from collections import Counter

import pytest

from kvpolicy import PluginError
from kvpolicy.plugins.registry import registry
from kvpolicy.tuning import TuneSettings, search_method
from kvpolicy.tuning.search_method import SearchMethod
from tests.tuning.searches import make_settings, run


def test_names_become_plugins_with_their_parameters():
    settings = TuneSettings(policy="h2o", policy_params={"recent_window": 16})
    method = SearchMethod.from_settings(settings)
    assert method.allocator is registry.get("allocator", "baklava") and method.learner is None
    assert method.policy == registry.create("policy", "h2o", {"recent_window": 16})
    assert method.choices.policy.name == "h2o" and method.choices.policy.params["recent_window"] == 16
    assert method.choices.estimator.name == "cosine" and method.choices.estimator.params
    assert (method.choices.allocator.name, method.choices.allocator.params) == ("baklava", {})
    assert sorted(method.search_space()) == ["floor_share", "head_exponent", "layer_exponent"]


def test_an_allocator_that_learns_has_the_parameters_that_were_given():
    settings = TuneSettings(allocator="learned", allocator_params={"steps": 3})
    method = SearchMethod.from_settings(settings)
    assert method.learner == registry.create("allocator", "learned", {"steps": 3})
    assert method.search_space() == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"allocator": "adakv"}, "'adakv' splits the budget at run time, prompt by prompt: there is no plan"),
        ({"allocator_params": {"floor_share": 0.1}}, "'baklava' are searched, not given; got floor_share"),
        ({"allocator": "learned", "allocator_params": {"steps": 0}}, "steps must be >= 1"),
        ({"estimator_params": {"nothing": 1}}, "nothing"),
    ],
)
def test_what_cannot_serve_a_search_is_refused(changes, message):
    with pytest.raises(PluginError, match=message):
        SearchMethod.from_settings(TuneSettings(**changes))


def test_a_search_looks_each_plugin_up_once(tmp_path, monkeypatch):
    lookups = Counter()

    class Counting:
        def get(self, role, name):
            lookups["get", role] += 1
            return registry.get(role, name)

        def create(self, role, name, params=None):
            lookups["create", role] += 1
            return registry.create(role, name, params)

    monkeypatch.setattr(search_method, "registry", Counting())
    run(make_settings(tmp_path, retentions=(0.4, 0.2), allocator="uniform", trials=1))
    assert lookups == {("create", "estimator"): 1, ("get", "allocator"): 1, ("create", "policy"): 1}
