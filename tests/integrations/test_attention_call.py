"""Who answers an attention call: a cache, a probe, or the model itself, in contexts that overlap in any order."""

import pytest
import torch

import kvpolicy
from kvpolicy import ModelError, ModelSpec
from kvpolicy.integrations.transformers.attention.attention_modules import attention_modules
from kvpolicy.integrations.transformers.attention.intercept import intercepted
from tests.tiny import over, tiny_ids, tiny_model


class Counting:
    """Answers as the model would."""

    def __init__(self):
        self.calls = []

    def __call__(self, call):
        self.calls.append(call)
        return call.stock()


def probed(model):
    """A handler on every attention module, and the context in which it answers."""
    handler = Counting()
    pairs = attention_modules(model, ModelSpec.from_config(model.config).budgeted_layers)
    return handler, intercepted(model, {module: handler for module, _ in pairs})


def test_a_handler_is_given_the_call_and_leaves_the_logits_alone():
    model, ids = tiny_model("Llama"), tiny_ids(20)
    expected = model(ids).logits
    handler, context = probed(model)
    with context:
        assert torch.equal(model(ids).logits, expected)
    assert [call.module.layer_idx for call in handler.calls] == [0, 1, 2]
    assert {call.query.shape for call in handler.calls} == {(1, 6, 20, 16)}
    assert {call.key.shape for call in handler.calls} == {(1, 2, 20, 16)}


@pytest.mark.parametrize("first_out", ["probe", "attached"])
@pytest.mark.parametrize("first_in", ["probe", "attached"])
def test_a_probe_and_a_context_that_overlap(first_in, first_out):
    model, ids = tiny_model("Llama"), tiny_ids(40)
    handler, probe = probed(model)
    contexts = {"probe": probe, "attached": kvpolicy.attached(model)}
    for name in dict.fromkeys([first_in, *contexts]):
        contexts[name].__enter__()
    contexts.pop(first_out).__exit__(None, None, None)
    with torch.no_grad():
        model(ids)
        assert len(handler.calls) == (3 if first_out == "attached" else 0)
        cache = kvpolicy.new_cache(model, retention=0.5, min_tokens=8)
        model(ids, **over(cache))
    assert int(cache.lengths.max()) < 40
    contexts.popitem()[1].__exit__(None, None, None)
    assert model.config._attn_implementation == "sdpa"


def test_a_forward_over_a_cache_goes_to_the_cache():
    model, ids = tiny_model("Llama"), tiny_ids(40)
    cache = kvpolicy.new_cache(model, retention=0.5, min_tokens=8)
    handler, context = probed(model)
    with torch.no_grad(), context:
        model(ids, **over(cache))
    assert not handler.calls
    assert int(cache.lengths.max()) < 40


def test_a_module_has_one_handler_at_a_time():
    model, ids = tiny_model("Llama"), tiny_ids(20)
    handler, outer = probed(model)
    _, inner = probed(model)
    with outer:
        with pytest.raises(ModelError, match="already being probed"), inner:
            pass
        model(ids)
    assert len(handler.calls) == 3
    assert model.config._attn_implementation == "sdpa"
