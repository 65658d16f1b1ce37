"""A cache is freed when it is dropped, as DynamicCache is: on a GPU the next one needs its memory."""

import copy
import gc
import weakref

import pytest
import torch

import kvpolicy
from tests.tiny import over, tiny_ids, tiny_model


@pytest.fixture
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def fed(cache, model):
    with torch.no_grad():
        model(tiny_ids(40), **over(cache))
        model(tiny_ids(1), **over(cache))
    return cache


CACHES = {
    "streaming": {"retention": 0.5, "min_tokens": 8},
    "snapkv": {"retention": 0.5, "min_tokens": 8, "policy": "snapkv"},
    "all": {"retention": 1.0},
    "fixed": {"retention": 0.5, "min_tokens": 8, "context_length": 64},
}


@pytest.mark.parametrize("name", CACHES)
def test_a_dropped_cache_is_freed_without_the_collector(name, no_collector):
    model = tiny_model("Llama")
    cache = fed(kvpolicy.new_cache(model, **CACHES[name]), model)
    entries = cache.store.layers[0].arena.keys
    held = [weakref.ref(cache), weakref.ref(entries)]
    del cache, entries
    assert [each() for each in held] == [None, None]


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_is_freed_after_generate(name, no_collector):
    model = tiny_model("Llama")
    cache = kvpolicy.new_cache(model, **CACHES[name])
    kvpolicy.generate(model, cache, tiny_ids(40), max_new_tokens=4, do_sample=False)
    held = weakref.ref(cache)
    del cache
    assert held() is None


def test_a_supplied_cache_is_freed(no_collector):
    model = tiny_model("Llama")
    with kvpolicy.attached(model, retention=0.5, min_tokens=8), torch.no_grad():
        out = model(tiny_ids(40), use_cache=True)
        (cache,) = (each for each in out.values() if isinstance(each, kvpolicy.RaggedCache))
        held = weakref.ref(cache)
        del out, cache
        assert held() is None


def test_a_copy_outlives_its_original_and_owns_its_layers():
    model = tiny_model("Llama")
    cache = fed(kvpolicy.new_cache(model, retention=0.5, min_tokens=8), model)
    expected = kvpolicy.new_cache(model, retention=0.5, min_tokens=8)
    fed(expected, model)
    branch = copy.deepcopy(cache)
    del cache
    assert all(layer.cache is branch for layer in branch.budgeted)
    with torch.no_grad():
        got, wanted = (model(tiny_ids(3), **over(each)).logits for each in (branch, expected))
    assert torch.equal(got, wanted)
