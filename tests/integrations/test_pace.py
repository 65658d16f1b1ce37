import torch

from kvpolicy.integrations.transformers.model import dtype
from tests.tiny import tiny_model


def timings(*pairs):
    """Stands in for the clock: (seconds, loss) of each call."""
    calls = iter(pairs)
    return lambda model, sequence: next(calls)


def state(model):
    return {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def test_a_model_that_stays_in_fp32_is_the_model_it_was(monkeypatch):
    model = tiny_model("Llama")
    before, x = state(model), torch.randint(3, 97, (64,))
    monkeypatch.setattr(dtype, "_timed", timings((1.0, 2.0), (0.5, 2.1)))  # fast, but the loss does not agree
    assert dtype.set_pace(model, x, choose_dtype=True).dtype == torch.float32
    after = state(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_bf16_leaves_the_rotary_frequencies_exact(monkeypatch):
    model = tiny_model("Llama")
    frequencies = {name: buffer.clone() for name, buffer in model.named_buffers() if "inv_freq" in name}
    assert frequencies
    monkeypatch.setattr(dtype, "_timed", timings((1.0, 2.0), (0.5, 2.001)))
    chosen = dtype.set_pace(model, torch.randint(3, 97, (64,)), choose_dtype=True)
    assert chosen.dtype == model.dtype == torch.bfloat16
    for name, buffer in model.named_buffers():
        if name in frequencies:
            assert torch.equal(buffer, frequencies[name])


def test_bf16_that_is_not_faster_is_not_taken(monkeypatch):
    model = tiny_model("Llama")
    monkeypatch.setattr(dtype, "_timed", timings((1.0, 2.0), (0.9, 2.0)))
    assert dtype.set_pace(model, torch.randint(3, 97, (64,)), choose_dtype=True).dtype == torch.float32
