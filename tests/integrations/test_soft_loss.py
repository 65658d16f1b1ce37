"""The differentiable loss: what it is at known biases, its gradient, and what it leaves behind."""

import pytest
import torch
import torch.nn.functional as F
from kvpolicy_kernels.formats import INT4, INT8, THINK

from kvpolicy import PluginError, PromptProbe, TransformersProbe
from kvpolicy.budget.entry_format import LayerFormats
from kvpolicy.integrations.transformers.attention import soft_attention
from kvpolicy.integrations.transformers.attention.attention_modules import attention_modules
from kvpolicy.integrations.transformers.probes import teacher
from kvpolicy.plugins.registry import registry
from tests.tiny import attention_of, tiny_ids, tiny_model
from tests.tiny_architectures import ARCHITECTURES

SPECIAL = ["Gemma3Window", "Gemma3n", "Gemma4", "Qwen3Next"]  # sliding, sharing and linear layers between the others


def probe_of(name, length=80, batch=2, **options):
    return TransformersProbe(tiny_model(name, attention=attention_of(name)), tiny_ids(length, batch), **options)


def nothing(heads):
    return lambda layer, rank: torch.zeros(heads, *rank.shape[1:])


def slopes(theta):
    """A smooth bias: each KV head's falls along the ranks as its theta says."""

    def bias(layer, rank):
        return -theta[layer].exp().to(rank.device)[:, None, None] * rank.clamp(min=0) / 20

    return bias


def hard(capacities, num_sink_tokens=4):
    def bias(layer, rank):
        visible = rank < (capacities[layer] - num_sink_tokens)[:, None, None]
        return torch.zeros(visible.shape).masked_fill(~visible, float("-inf"))

    return bias


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_without_a_bias_it_is_the_full_cache(name):
    probe = probe_of(name)
    heads = probe.spec.num_kv_heads
    with torch.no_grad():
        plain = [F.cross_entropy(probe.model(x[None]).logits[0, 19:-1], x[20:]) for x in probe.sequences]
    torch.testing.assert_close(probe.soft_loss(nothing(heads)), torch.zeros(2), rtol=0, atol=1e-6)
    text = probe.soft_loss(nothing(heads), "text")
    torch.testing.assert_close(text, torch.stack(plain), rtol=0, atol=2e-6)
    torch.testing.assert_close(text.double(), probe.full_loss(), rtol=0, atol=2e-6)
    assert text[0] != text[1]
    assert torch.equal(probe.soft_loss(nothing(heads), "text", sequence=1), text[1:])


@pytest.mark.parametrize("prefill", [0, 33])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_hard_bias_is_the_window_rule(name, prefill, monkeypatch):
    monkeypatch.setitem(soft_attention._SCORES, "cpu", 2**18)  # several blocks of queries
    probe = probe_of(name, length=300, batch=1, prefill_length=prefill)
    capacities = torch.randint(5, 120, probe.spec.table_shape, generator=torch.Generator().manual_seed(3))
    found = probe.soft_loss(hard(capacities), "text").double()
    torch.testing.assert_close(found, probe.loss(capacities), rtol=0, atol=2e-6)
    assert abs(float(found - probe.full_loss())) > 1e-4, "the window must matter"


FORMATS = [INT8, INT4, LayerFormats((INT4, None, INT8))]


@pytest.mark.parametrize("prefill", [0, 33])
@pytest.mark.parametrize("entry_format", FORMATS)
def test_under_a_format_a_hard_bias_is_the_window_rule_over_codes(entry_format, prefill, monkeypatch):
    monkeypatch.setitem(soft_attention._SCORES, "cpu", 2**18)  # several blocks of queries
    model = tiny_model("Llama").double()  # else a last bit of a key changes its code
    options = {"entry_format": entry_format, "prefill_length": prefill}
    probe, plain = TransformersProbe(model, tiny_ids(200), **options), TransformersProbe(model, tiny_ids(200))
    capacities = torch.randint(36, 120, probe.spec.table_shape, generator=torch.Generator().manual_seed(3))
    found = probe.soft_loss(hard(capacities), "text").double()
    torch.testing.assert_close(found, probe.loss(capacities), rtol=0, atol=2e-6)
    assert abs(float(found - plain.soft_loss(hard(capacities), "text"))) > 1e-6, "the codes must matter"
    assert float(probe.soft_loss(nothing(2))) > 1e-7, "the teacher has no codes"


@pytest.mark.parametrize("entry_format", FORMATS)
def test_under_a_format_a_hard_bias_is_the_compressed_prompt(entry_format):
    policy, model = registry.create("policy", "snapkv"), tiny_model("Llama").double()
    probe = PromptProbe(model, tiny_ids(140), policy=policy, prefill_length=100, entry_format=entry_format)
    capacities = torch.randint(40, 90, probe.spec.table_shape, generator=torch.Generator().manual_seed(3))
    found = probe.soft_loss(hard(capacities, policy.num_sink_tokens), "text").double()
    torch.testing.assert_close(found, probe.loss(capacities), rtol=0, atol=2e-6)


def test_thin_keys_have_no_gradients():
    policy = registry.create("policy", "snapkv")
    probe = PromptProbe(tiny_model("Llama"), tiny_ids(140), policy=policy, prefill_length=100, entry_format=THINK)
    with pytest.raises(PluginError, match="observe_gradients is that of whole keys, and under format=think they lose"):
        probe.observe_gradients(print, sequence=0)


def test_gradients_pass_by_the_rounding():
    model = tiny_model("Llama").double()
    probe = TransformersProbe(model, tiny_ids(150), entry_format=INT4)
    theta = torch.full(probe.spec.table_shape, -0.5, dtype=torch.float64, requires_grad=True)
    probe.soft_loss(slopes(theta)).sum().backward()
    plain = theta.detach().clone().requires_grad_()
    TransformersProbe(model, tiny_ids(150)).soft_loss(slopes(plain)).sum().backward()
    torch.testing.assert_close(theta.grad, plain.grad, rtol=0.3, atol=1e-4)


def test_the_divergence_is_that_of_the_two_predictions():
    probe, capacities = probe_of("Llama", length=60, batch=1), torch.full((3, 2), 9)

    def windows(layer, q, k):
        visible = (k < 4) | (q[:, None] - k < 9 - 4)
        return torch.zeros(visible.shape).masked_fill(~visible, float("-inf")).expand(2, -1, -1)

    with torch.no_grad():
        full = probe.model(probe.sequences).logits[0].double()
        handlers = [
            soft_attention.BiasedAttention(module, probe.spec, row, windows, 0)
            for row, (module, _) in enumerate(attention_modules(probe.model, range(3)))
        ]
        with soft_attention.biased(probe.model, handlers, []):
            soft = probe.model(probe.sequences).logits[0].double()
    expected = 0.0
    for position in range(14, 59):  # those that predict the tokens from 60 // 4 on
        p, q = full[position].softmax(0), soft[position].softmax(0)
        expected += sum(float(a) * float(a.log() - b.log()) for a, b in zip(p, q, strict=True)) / 45
    assert expected > 1e-3
    assert float(probe.soft_loss(hard(capacities))) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("target", ["full", "text"])
@pytest.mark.parametrize("name", ["Llama", "Gemma2", "GptOss", *SPECIAL])
def test_the_gradient_is_that_of_finite_differences(name, target):
    experts = name in ("GptOss", "Qwen3Next")
    more = {"num_experts_per_tok": 2} if experts else {}  # all of them: the choice of one is a jump
    model = tiny_model(name, attention=attention_of(name), **more)
    if not experts:  # their product takes no float64
        model = model.double()
    probe = TransformersProbe(model, tiny_ids(300))
    theta = torch.full(probe.spec.table_shape, -0.5, dtype=torch.float64, requires_grad=True)
    probe.soft_loss(slopes(theta), target).sum().backward()
    for index in ((0, 0), (probe.spec.num_budgeted_layers - 1, 1)):
        ends = []
        for step in (0.005, -0.005):
            moved = theta.detach().clone()
            moved[index] += step
            with torch.no_grad():
                ends.append(float(probe.soft_loss(slopes(moved), target)))
        assert float(theta.grad[index]) == pytest.approx((ends[0] - ends[1]) / 0.01, rel=0.03, abs=1e-4)
    assert float(theta.grad.abs().max()) > 1e-3


@pytest.mark.parametrize("frozen", [False, True])
def test_the_model_is_left_as_it_was(frozen):
    probe = probe_of("Llama", length=40)
    model, block = probe.model, probe.model.model.layers[0]
    model.requires_grad_(not frozen)
    model.lm_head.weight.requires_grad_(False)
    needs = [parameter.requires_grad for parameter in model.parameters()]
    with torch.no_grad():
        plain = model(probe.sequences).logits
    theta = torch.zeros(3, 2, requires_grad=True)
    loss = probe.soft_loss(slopes(theta)).sum()

    def check():
        assert [parameter.requires_grad for parameter in model.parameters()] == needs
        assert "forward" not in vars(block) and model.config._attn_implementation == "sdpa"
        with torch.no_grad():
            assert torch.equal(plain, model(probe.sequences).logits)

    check()
    loss.backward()
    check()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_forward_of_another_library_is_put_back():
    probe = probe_of("Llama", length=40)
    block = probe.model.model.layers[1]
    plain, calls = block.forward, []

    def hooked(*args, **kwargs):
        calls.append(1)
        return plain(*args, **kwargs)

    block.forward = hooked
    theta = torch.zeros(3, 2, requires_grad=True)
    probe.soft_loss(slopes(theta), sequence=0).sum().backward()
    assert block.forward is hooked and len(calls) == 3  # the full cache's, the biased one, and again for the gradient


def test_the_model_is_left_as_it_was_after_an_error():
    probe, calls = probe_of("Llama", length=40), []

    def failing(layer, rank):
        calls.append(layer)
        if len(calls) == 3:
            raise RuntimeError("no bias")
        return torch.zeros(2, *rank.shape[1:])

    with pytest.raises(RuntimeError, match="no bias"):
        probe.soft_loss(failing)
    assert "forward" not in vars(probe.model.model.layers[0]) and probe.model.config._attn_implementation == "sdpa"
    assert all(parameter.requires_grad for parameter in probe.model.parameters())


@pytest.mark.parametrize("kept", [False, True])
def test_scores_are_not_held_between_forward_and_backward(monkeypatch, kept):
    """`kept` is the counter-check: without checkpoints there are more numbers than one layer's scores have."""
    if kept:
        monkeypatch.setattr(
            soft_attention, "checkpoint", lambda function, *args, **named: plainly(function, args, named)
        )
    probe, held = probe_of("Llama", length=128, batch=1), []
    theta = torch.zeros(3, 2, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (held.append(x.numel()), x)[1], lambda x: x):
        probe.soft_loss(slopes(theta)).sum()
    assert held and (sum(held) > 6 * 128 * 128) == kept


def plainly(function, args, kwargs):
    for option in ("use_reentrant", "preserve_rng_state", "context_fn"):
        kwargs.pop(option, None)
    return function(*args, **kwargs)


def test_the_full_caches_logits_are_kept_while_they_are_small(monkeypatch):
    probe, forwards = probe_of("Llama", length=40), []
    probe.model.register_forward_hook(lambda *_: forwards.append(1))
    for _ in range(2):
        probe.soft_loss(nothing(2), sequence=0)
    assert len(forwards) == 3  # the full cache's once
    monkeypatch.setattr(teacher, "_TEACHER_BYTES", 0)
    probe.soft_loss(nothing(2), sequence=1)
    probe.soft_loss(nothing(2), sequence=1)
    assert len(forwards) == 7


def test_what_does_not_fit_is_refused_by_name():
    probe = probe_of("Llama", length=40)
    with pytest.raises(PluginError, match="target must be 'full' or 'text', got 'half'"):
        probe.soft_loss(nothing(2), "half")
    for sequence in (2, -1):
        with pytest.raises(PluginError, match=f"there are 2 sequences, from 0; got {sequence}"):
            probe.soft_loss(nothing(2), sequence=sequence)
    with pytest.raises(PluginError, match=r"the bias of layer 0 has shape \[6, 40, 40\], expected .* = \[2, 40, 40\]"):
        probe.soft_loss(nothing(6))
