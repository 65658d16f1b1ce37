"""What a layer asks of torch for a prompt, and for a chunk behind it: a launch each on a GPU, whose host they keep."""

import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kvpolicy.cache import RaggedStore
from kvpolicy.cache.schedule import Fixed
from kvpolicy.cache.scoring import Scoring
from tests.cache.play import spec_of, tensors
from tests.cache.policies import KeyNorm, Recent

MOST = {Recent: (70, 58), KeyNorm: (79, 76)}  # of a prompt that opens its layer, of a chunk behind it


class Count(TorchDispatchMode):
    """Counts operations but for those inside a kernel's definition, which are one launch elsewhere."""

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        frame, inside = sys._getframe(1), False
        while frame is not None and not inside:
            frame, inside = frame.f_back, "kvpolicy_kernels" in frame.f_code.co_filename
        self.operations += not inside
        return func(*args, **kwargs or {})


def operations(policy, layers):
    """Of all layers in a prompt of 20 tokens, and in a chunk of 5."""
    store = RaggedStore(spec_of(layers, 2), Fixed(torch.full((layers, 2), 8)), policy, decode="append")
    query, key, value = tensors(25)
    counts = []
    for part in (slice(0, 20), slice(20, 25)):
        with Count() as count:
            for layer in range(layers):
                store.prefill(layer, query[:, :, part], key[:, :, part], value[:, :, part])
        counts.append(count.operations)
    return counts


@pytest.mark.parametrize("policy", MOST)
def test_a_layer_asks_torch_for_few_operations(policy):
    counts = zip(operations(policy(), 2), operations(policy(), 7), strict=True)
    for (few, many), most in zip(counts, MOST[policy], strict=True):
        assert (many - few) / 5 <= most


def test_what_ops_look_up_is_brought_once_for_all_layers():
    store = RaggedStore(spec_of(3, 2), Fixed(torch.tensor([[8, 5], [6, 7], [9, 9]])), KeyNorm())
    query, key, value = tensors(30, seed=1)
    for layer in range(3):
        store.prefill(layer, query[:, :, :20], key[:, :, :20], value[:, :, :20])
    arenas = [layer.arena for layer in store.layers]
    held = store.nbytes
    chunk = store.arrive(0, key[:, :, 20:], value[:, :, 20:])
    brought = [arena.brought for arena in arenas]
    assert len({tables[0].untyped_storage().data_ptr() for tables in brought}) == 1
    for arena, (starts, lengths) in zip(arenas, brought, strict=True):
        assert starts.tolist() == arena.start.tolist()
        assert lengths.tolist() == arena.length.tolist()
    assert store.nbytes == held + 2 * 3 * 2 * 8 + 8  # and what the first layer has seen now
    store.keep(0, query[:, :, 20:], chunk, Scoring())
    for layer in (1, 2):
        store.prefill(layer, query[:, :, 20:], key[:, :, 20:], value[:, :, 20:])
    assert store.nbytes == held
    assert all(arena.brought[0] is not old[0] for arena, old in zip(arenas, brought, strict=True))


def test_positions_of_new_tokens_are_one_table_of_all_layers():
    store = RaggedStore(spec_of(3, 2), Fixed(torch.full((3, 2), 8)), Recent())
    query, key, value = tensors(6, seed=1)
    chunks = []
    for layer in range(3):
        chunks.append(store.arrive(layer, key, value))
        store.keep(layer, query, chunks[-1], Scoring())
    assert len({id(chunk.positions) for chunk in chunks}) == 1
    assert len({chunk.places.on(key.device).data_ptr() for chunk in chunks}) == 1
