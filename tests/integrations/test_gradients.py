"""The gradients of what heads say, and the attention that comes with them."""

import pytest
import torch
from kvpolicy_baselines.snapkv import SnapKVPolicy

from kvpolicy import PluginError, PromptProbe, TransformersProbe
from kvpolicy.testing import SyntheticProbe
from tests.tiny import attention_of, tiny_ids, tiny_model


def parts(probe, **options):
    found = []
    probe.observe_gradients(found.append, sequence=0, **options)
    return found


@pytest.mark.parametrize("name", ["Llama", "Gemma2Window", "GptOssWindow", "Cohere2"])
def test_weights_and_values_are_the_output(name):
    """With softcaps, sinks, sliding layers beside the budgeted ones, and blocks of decoder layers of their own."""
    model, ids = tiny_model(name, attention=attention_of(name)), tiny_ids(40)
    probe, outputs = TransformersProbe(model, ids, [ids[0]]), {}
    probe.observe(lambda seen: outputs.update({seen.layer: seen.output[0].clone()}), frozenset({"output"}))
    found = parts(probe)
    assert [part.layer for part in found] == sorted(outputs, reverse=True), "the last layer first"
    for part in found:
        group = part.gradients.shape[0] // part.values.shape[0]
        values = part.values.repeat_interleave(group, 0)
        for begin, end in ((0, 40), (7, 29)):
            out = part.weights(begin, end) @ values[:, :end]
            torch.testing.assert_close(out, outputs[part.layer][:, begin:end], atol=1e-5, rtol=1e-4)
        assert part.gradients.shape == outputs[part.layer].shape
        assert part.first == 0
        assert part.ranks(7, 9)[0].tolist() == [[-1] * 4 + [3, 2, 1, 0, 0], [-1] * 4 + [4, 3, 2, 1, 0]]


def test_gradients_are_those_of_what_a_head_says():
    """Of the first layer, by hooks on the output projection of a model that nothing intercepts."""
    model, ids = tiny_model("Llama"), tiny_ids(24)
    probe = TransformersProbe(model, ids)
    with torch.no_grad():
        logits = probe.scored_logits(ids)
    drawn = torch.multinomial(logits[0].softmax(-1), 1, generator=torch.Generator().manual_seed(5))[:, 0]
    seen = []
    projection = model.model.layers[0].self_attn.o_proj
    hook = projection.register_full_backward_hook(lambda module, before, behind: seen.append(before[0]))
    rows = model(ids).logits[0, probe.first_scored - 1 : -1]
    torch.nn.functional.cross_entropy(rows, drawn, reduction="sum").backward()
    hook.remove()
    expected = seen[0][0].unflatten(-1, (6, 16)).transpose(0, 1)
    before = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    found = parts(probe, seed=5)[-1]
    torch.testing.assert_close(found.gradients, expected, atol=1e-6, rtol=1e-4)
    assert found.gradients.abs().max() > 1e-3
    assert all(torch.equal(parameter.grad, before[name]) for name, parameter in model.named_parameters())
    assert all(parameter.requires_grad for parameter in model.parameters()), "the model is left as it was"


def test_behind_a_prompt_the_policy_ranks():
    ids = tiny_ids(48)
    policy = SnapKVPolicy(observation_window=4, recent_window=4, num_sink_tokens=1)
    probe = PromptProbe(tiny_model("Llama"), ids, policy=policy, prefill_length=32)
    assert probe.num_scored == 16
    for part in parts(probe):
        assert part.first == 32
        ranks = part.ranks(32, 40)
        assert ranks.shape == (2, 8, 40)
        assert sorted(ranks[0, 0, :32].tolist()) == [-1, *range(31)], "the prompt's entries, its sink token apart"
        assert (ranks[:, :, 32:] == -1).all()


def test_draws_follow_the_seed():
    probe = TransformersProbe(tiny_model("Llama"), tiny_ids(24))
    first, again, other = (parts(probe, seed=seed)[0].gradients for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("sequence", [-1, 2])
def test_a_sequence_that_there_is_not(sequence):
    for probe in (TransformersProbe(tiny_model("Llama"), tiny_ids(24, batch=2)), SyntheticProbe()):
        with pytest.raises(PluginError, match=f"there are 2 sequences, from 0; got {sequence}"):
            probe.observe_gradients(print, sequence=sequence)
