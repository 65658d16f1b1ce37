import pytest
import torch


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that an op asks for is full of NaN, so that a result nobody wrote is seen."""
    empty = torch.Tensor.new_empty

    def new_empty(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
