"""The differentiable loss on a GPU, where torch's fused attention gives the bias its gradient."""

import pytest
import torch

from kvpolicy import TransformersProbe
from kvpolicy.integrations.transformers.attention import soft_attention
from tests.integrations.test_soft_loss import slopes
from tests.tiny import attention_of, tiny_ids, tiny_model
from tests.tiny_architectures import ARCHITECTURES

pytestmark = pytest.mark.gpu


def learned(model, length=203):
    """The loss and the gradient of a bias."""
    probe = TransformersProbe(model, tiny_ids(length))
    theta = torch.full(probe.spec.table_shape, -0.5, dtype=torch.float64, requires_grad=True)
    loss = probe.soft_loss(slopes(theta)).sum()
    loss.backward()
    return float(loss.detach()), theta.grad


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_as_on_the_cpu(name, monkeypatch):
    monkeypatch.setitem(soft_attention._SCORES, "cuda", 2**16)  # several blocks of queries, the last one not aligned
    model = tiny_model(name, attention=attention_of(name))
    expected, gradient = learned(model)
    found, on_gpu = learned(model.cuda())
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)
    torch.testing.assert_close(on_gpu, gradient, rtol=5e-3, atol=1e-3 * float(gradient.abs().max()))


def test_bf16_points_the_same_way():
    model = tiny_model("Llama").cuda()
    _, gradient = learned(model)
    _, half = learned(model.bfloat16())
    assert float(torch.cosine_similarity(half.flatten(), gradient.flatten(), dim=0)) > 0.98
