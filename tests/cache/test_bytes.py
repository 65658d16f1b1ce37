"""What a store weighs."""

import pytest
import torch

from kvpolicy import LayerSpec, ModelSpec
from kvpolicy.budget.ask import Ask
from kvpolicy.cache import RaggedStore
from kvpolicy.cache.schedule import Fixed, Growing
from kvpolicy.cache.store import Scoring
from tests.cache.play import Play
from tests.cache.policies import KeyNorm, Recent, ValueNorm
from tests.cache.test_runtime_split import ModelTopK, feed, prompts, store_of

LAYERS, HEADS, DIM = 3, 3, 64
SHARES = torch.tensor([[1.0, 2.0, 3.0], [2.0, 2.0, 2.0], [4.0, 1.0, 1.0]])
SPEC = ModelSpec("test", 576, 97, 8192, "", (LayerSpec("full", 9, HEADS, DIM, DIM),) * LAYERS)
ENTRY = 2 * DIM * 2  # bytes of a key and a value in bf16


def filled(policy, schedule, length, batch=1, hold=0):
    store = RaggedStore(SPEC, schedule, policy, batch_size=batch)
    for layer in range(LAYERS):
        query = torch.randn(batch, 9, length, DIM, dtype=torch.bfloat16)
        key, value = (torch.randn(batch, HEADS, length, DIM, dtype=torch.bfloat16) for _ in range(2))
        store.keep(layer, query, store.arrive(layer, key, value), Scoring(), hold=hold)
    return store


def tensors_in(thing, seen=None):
    """Every tensor that can be reached from an object of this project."""
    seen = {} if seen is None else seen
    if id(thing) in seen:
        return
    seen[id(thing)] = thing
    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, dict | list | tuple):
        for part in thing.values() if isinstance(thing, dict) else thing:
            yield from tensors_in(part, seen)
    elif type(thing).__module__.startswith("kvpolicy"):
        for name in {*getattr(thing, "__dict__", {}), *getattr(type(thing), "__slots__", ())}:
            yield from tensors_in(getattr(thing, name, None), seen)


def storages(store):
    """Bytes of all memory that a store's tensors keep alive."""
    found = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors_in(store)}
    return sum(found.values())


@pytest.mark.parametrize("hold", [0, 8])
@pytest.mark.parametrize("policy", [Recent(), ValueNorm()], ids=str)
def test_nbytes_is_all_memory_that_is_kept_alive(policy, hold):
    store = filled(policy, Fixed(torch.tensor([[300, 400, 500]] * LAYERS)), 1000, batch=2, hold=hold)
    given = torch.randn(2, 9, 1, DIM, dtype=torch.bfloat16)
    for _ in range(0 if hold else 20):
        for layer in range(LAYERS):
            store.decode(layer, given, given[:, :HEADS], given[:, :HEADS])
    assert store.nbytes == storages(store)
    store.take(torch.tensor([1, 0, 1]))
    assert store.nbytes == storages(store)
    if hold:
        store.crop(3)
        assert store.nbytes == storages(store)
    held = int(store.lengths.sum()) * ENTRY
    assert held < store.nbytes < 1.06 * held


def test_nbytes_of_a_run_time_split_is_all_memory_that_is_kept_alive():
    store = feed(store_of(ModelTopK(), batch_size=2), prompts(50, batch=2))
    assert store.nbytes == storages(store)


@pytest.mark.parametrize(("policy", "part"), [(Recent(), 0.02), (ValueNorm(), 0.035)], ids=["window rule", "scored"])
def test_what_is_held_besides_entries(policy, part):
    store = filled(policy, Fixed(torch.tensor([[300, 400, 500]] * LAYERS)), 1000)
    held = int(store.lengths.sum()) * ENTRY
    assert int(store.lengths.sum()) == LAYERS * 1200
    assert 0 < store.nbytes - held < part * held


@pytest.mark.parametrize("policy", [Recent(), ValueNorm()], ids=str)
@pytest.mark.parametrize("retention", [0.5, 0.3, 0.1])
def test_after_a_prompt_the_bytes_are_those_of_the_entries(policy, retention):
    store = filled(policy, Growing((LAYERS, HEADS), lambda kept, context: SHARES, Ask(retention), 3), 4000)
    entries = round(retention * 4000 * LAYERS * HEADS)
    assert int(store.lengths.sum()) == entries
    tables = sum(layer.arena.positions.nbytes for layer in store.layers)
    tables += sum(0 if layer.arena.scores is None else layer.arena.scores.nbytes for layer in store.layers)
    assert store.nbytes <= 1.05 * entries * ENTRY + tables
    assert store.nbytes - tables < 1.01 * entries * ENTRY, "no slack where a segment is full"
    assert store.dense_nbytes == 4000 * LAYERS * HEADS * ENTRY


@pytest.mark.parametrize("hold", [0, 8])
def test_no_gradient_keeps_a_prompt_alive(hold):
    spec = ModelSpec("test", 576, 97, 8192, "", SPEC.layers[:1])
    store = RaggedStore(spec, Fixed(torch.full((1, HEADS), 20)), ValueNorm())
    query, key = torch.randn(1, 9, 500, DIM), torch.randn(1, HEADS, 500, DIM, requires_grad=True)
    out = store.attend_chunk(0, query, chunk := store.arrive(0, key, key), Scoring())
    store.keep(0, query, chunk, Scoring(), hold=hold)
    if not hold:
        store.decode(0, query[:, :, :1], key[:, :, :1], key[:, :, :1])
    assert out.requires_grad
    assert not any(x.requires_grad for x in store.layers[0].tensors.values())


def test_an_empty_store_weighs_nothing():
    store = RaggedStore(SPEC, Fixed(torch.full((LAYERS, HEADS), 20)), Recent())
    assert (store.nbytes, store.dense_nbytes, store.seen.tolist()) == (0, 0, [0])


def test_long_decoding_holds_no_more_than_its_capacity():
    store = filled(Recent(), Fixed(torch.tensor([[30, 40, 50]] * LAYERS)), 10)
    given = torch.randn(1, 9, 1, DIM, dtype=torch.bfloat16)
    for _ in range(100):
        for layer in range(LAYERS):
            store.decode(layer, given, given[:, :HEADS], given[:, :HEADS])
    assert [len(layer.arena.keys) for layer in store.layers] == [120] * LAYERS


def test_rows_that_are_dropped_leave_nothing_behind():
    def decoded(batch):
        play = Play(KeyNorm(1), [5, 7], batch=batch)
        play.prompt(12)
        play.decode()
        play.store.take([0])
        return play.store.nbytes

    assert decoded(4) <= decoded(1)
