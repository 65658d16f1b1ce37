"""A policy around another one: what it says of itself is what the inner one says."""

import math
from dataclasses import dataclass

import pytest

from kvpolicy import EvictionPolicy, PluginError, WrappingPolicy, registry
from kvpolicy.plugins.checks import class_problems
from kvpolicy.testing import check_eviction_policy
from tests.cache.play import store_of, tensors


@dataclass(frozen=True, slots=True)
class Passing(WrappingPolicy):
    """Says what the inner policy says."""

    def score_prompt(self, activations):
        return self.policy.score_prompt(activations)


INNER = [
    ("h2o", {"recent_window": 2}),
    ("snapkv", {"recent_window": 3, "observation_window": 4, "kernel_size": 1}),
    ("kv_compress", {"recent_window": 2, "observation_window": 3, "attention_power": 1.5}),
    ("streaming", {"num_sink_tokens": 2}),
    ("tova", {}),
]


@pytest.mark.parametrize(("name", "params"), INNER)
def test_around_a_policy_a_cache_keeps_what_it_keeps(name, params):
    inner = registry.create("policy", name, params)
    stores = [store_of(policy, [6, 9]) for policy in (inner, Passing(name, params))]
    given = tensors(30)
    for begin, end in ((0, 16), (16, 20), *((i, i + 1) for i in range(20, 28)), (28, 30)):
        part = [x[:, :, begin:end] for x in given]
        for store in stores:
            (store.prefill if end - begin > 1 else store.decode)(0, *part)
        ours, theirs = ([sorted(p.tolist()) for p in store.positions(0)] for store in stores)
        assert ours == theirs


@pytest.mark.parametrize(("name", "params"), INNER)
def test_a_wrapping_policy_keeps_the_laws(name, params):
    check_eviction_policy(Passing(name, params))


def test_it_says_what_the_inner_policy_says():
    policy = Passing("kv_compress", {"attention_power": 1.5, "num_sink_tokens": 3})
    assert policy.rescores and policy.new_entry_score == 0 and policy.attention_power == 1.5
    assert policy.num_sink_tokens == 3 and policy.least_capacity == 4 and policy.recent_window == 8
    assert policy.requires == {"window_attention", "decode_attention", "positions"}
    assert not Passing("snapkv").rescores and Passing("snapkv").new_entry_score == math.inf
    assert Passing("streaming").window_rule and Passing("kvzip", {"repeat_chunk": 7}).repeat_chunk == 7
    assert policy.params() == {"inner": "kv_compress", "inner_params": {"attention_power": 1.5, "num_sink_tokens": 3}}
    assert class_problems("policy", Passing) == []


def test_an_inner_policy_that_does_not_rescore_is_not_asked_in_a_step():
    @dataclass(frozen=True, slots=True)
    class Silent(Passing):
        def score_step(self, step):
            raise AssertionError("asked")

    store = store_of(Silent("snapkv"), [6, 9])
    store.prefill(0, *tensors(16))
    store.decode(0, *tensors(1))


def test_what_a_policy_says_of_its_steps_is_checked():
    @dataclass(frozen=True, slots=True)
    class Wrong(Passing):
        @property
        def rescores(self):
            return 1

    with pytest.raises(PluginError, match="`rescores` is 1, expected a bool"):
        store_of(Wrong("snapkv"), [6, 9])


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"inner": "snapvk"}, "no policy named 'snapvk' \\(did you mean 'snapkv'"),
        ({"inner_params": {"kernel": 3}}, "there is no parameter 'kernel' \\(did you mean 'kernel_size'"),
        ({"inner_params": {"kernel_size": 2}}, "kernel_size must be odd"),
    ],
)
def test_an_inner_policy_that_cannot_be_is_refused(given, error):
    with pytest.raises(PluginError, match=error):
        Passing(**given)


def test_the_default_is_whether_the_class_rescores():
    assert issubclass(Passing, EvictionPolicy)
    assert registry.create("policy", "corm").rescores and not registry.create("policy", "expected_attention").rescores
