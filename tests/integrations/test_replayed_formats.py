"""Formats, and layers that share entries, as replays: they give what they give without, on a GPU too."""

import pytest
import torch
from kvpolicy_kernels.formats import INT4, INT8

import kvpolicy
from kvpolicy.budget.entry_format import LayerFormats
from kvpolicy.cache.encoded_arena import EncodedArena
from tests.integrations.ragged_oracle import stepped_logits
from tests.integrations.recording import record_on_cpu
from tests.tiny import over, tiny_ids, tiny_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHARED = {2: 0}
CASES = {
    "int8": {"format": "int8"},
    "int4": {"format": "int4"},
    "a format for each layer": {"format": LayerFormats((INT4, None, INT8))},
    "fewer key channels": {"format": "think"},
    "layers that share": {"shared_layers": SHARED},
    "layers that share codes": {"shared_layers": SHARED, "format": "int4"},
}


@pytest.fixture(scope="module")
def model():
    return tiny_model("Llama").to(DEVICE)


def cache_over(model, case, policy):
    return kvpolicy.new_cache(model, policy=policy, retention=0.5, context_length=130, **CASES[case])


@pytest.mark.parametrize("policy", ["streaming", pytest.param("h2o", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("case", CASES)
def test_two_prompts(case, policy, model, monkeypatch):
    """One cache, reset between them. A replay on a GPU reads codes, and what is expected decodes them."""
    if DEVICE == "cpu":
        record_on_cpu(monkeypatch)
    caches, ids = [cache_over(model, case, policy) for _ in range(2)], tiny_ids(108, batch=2).to(DEVICE)
    for prompt in (100, 95):
        found = []
        for cache, is_replayed in zip(caches, (True, False), strict=True):
            cache.reset()
            with torch.no_grad(), monkeypatch.context() as patch:
                if not is_replayed:
                    patch.setattr(EncodedArena, "reads_codes", False)
                logits = [model(ids[:, :prompt], **over(cache), logits_to_keep=1).logits]
                forward = model if is_replayed else model.forward.own
                logits += [forward(one, **over(cache)).logits for one in ids[:, prompt:].split(1, 1)]
            found.append(torch.cat(logits, 1))
            assert (cache.replays.mode, cache.replays.why) == (("graph", None) if is_replayed else (None, None))
        torch.testing.assert_close(*found, rtol=0, atol=2e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["streaming", "keydiff"])
@pytest.mark.parametrize("case", ["fewer key channels", "layers that share"])
def test_as_on_the_cpu(case, policy, model):
    """A last bit changes a code, so of these alone; it decides between near ties of snapkv's scores, too."""
    ids, found = tiny_ids(125, batch=2), []
    for own in (model, tiny_model("Llama")):
        cache = cache_over(own, case, policy)
        device = next(own.parameters()).device
        found.append(stepped_logits(own, ids.to(device), cache, [90, *[1] * 20, 5, *[1] * 10]).cpu())
    torch.testing.assert_close(*found, rtol=0, atol=2e-4)
