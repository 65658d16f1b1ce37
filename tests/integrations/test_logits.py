"""A model whose forward takes no logits_to_keep is measured like one that does."""

import torch
import transformers

import kvpolicy
from kvpolicy.integrations.transformers import Prompts, TransformersProbe
from kvpolicy.integrations.transformers.model.dtype import _timed
from tests.tiny import tiny_ids, tiny_model


class Plain(transformers.LlamaForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, use_cache=None, **given):
        assert "logits_to_keep" not in given
        return super().forward(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache, **given
        )


def models():
    llama = tiny_model("Llama")
    plain = Plain(llama.config).eval()
    plain.load_state_dict(llama.state_dict())
    return llama, plain


def test_the_same_losses_and_observations():
    found = []
    for model in models():
        probe, seen = TransformersProbe(model, tiny_ids(64), [tiny_ids(30)[0]]), []
        probe.observe(lambda activations, seen=seen: seen.append(activations.hidden_after), frozenset({"hidden_after"}))
        found.append((probe.losses_of(tiny_ids(64)), torch.stack(seen)))
        assert _timed(model, tiny_ids(64)[0])[1] > 0
    (losses, hidden), (same_losses, same_hidden) = found
    torch.testing.assert_close(same_losses, losses, rtol=0, atol=1e-6)
    assert torch.equal(same_hidden, hidden)


def test_the_same_prompts():
    found = []
    for model in models():
        policy = kvpolicy.registry.create("policy", "streaming")
        cache, logits = Prompts(model, [tiny_ids(40)], policy).compressed(0, torch.full((3, 2), 20))
        assert logits.shape == (1, 1, 97) and int(cache.lengths.max()) == 20
        found.append(logits)
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)
