"""Planning a token, whatever the batch: what it costs the host."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kvpolicy.cache import RaggedStore
from kvpolicy.cache.schedule import Fixed
from kvpolicy.cache.scoring import Scoring
from tests.cache.play import spec_of, tensors
from tests.cache.policies import KeyNorm, Recent

SHARED = 32768  # numbers from which on torch shares an operation between threads


class Watch(TorchDispatchMode):
    """Notes operations that torch would share between threads. Making a tensor and looking at one are none."""

    def __init__(self):
        super().__init__()
        self.shared = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        is_cheap = func.is_view or "empty" in func.name()
        tensors = [x for x in (out, *args) if isinstance(x, torch.Tensor)]
        if not is_cheap and any(x.device.type == "cpu" and x.numel() >= SHARED for x in tensors):
            self.shared.append(func.name())
        return out


def test_no_operation_of_a_plan_is_shared_between_threads():
    layers, heads, batch = 4, 8, 1100
    for policy in (Recent(1), KeyNorm(1)):
        store = RaggedStore(spec_of(layers, heads), Fixed(torch.full((layers, heads), 3)), policy, batch_size=batch)
        query, key, value = tensors(8, batch, heads)
        for layer in range(layers):
            chunk = store.arrive(layer, key[:, :, :4], value[:, :, :4])
            store.keep(layer, query[:, :, :4], chunk, Scoring())
        for token in range(4, 7):
            with Watch() as watch:
                assert store.advance()
            assert watch.shared == []
            for layer in range(layers):
                store.append(layer, key[:, :, token : token + 1], value[:, :, token : token + 1])
