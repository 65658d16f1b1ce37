"""The ragged store: which token lies where, what it may see, and what it weighs."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kvpolicy_kernels.window_attention.reference import window_mask

from kvpolicy import BudgetError, LayerSpec, ModelSpec
from kvpolicy.cache import RaggedStore

HEADS, GROUP, KEY_DIM, VALUE_DIM = 2, 3, 8, 6


def spec_of(layers=1, heads=HEADS, group=GROUP):
    layer = LayerSpec("full", num_q_heads=heads * group, num_kv_heads=heads, key_dim=KEY_DIM, value_dim=VALUE_DIM)
    return ModelSpec("test", 32, 97, 512, "", (layer,) * layers)


def tensors(length, batch=1, heads=HEADS, seed=0):
    """(query, key, value) of a whole sequence."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((heads * GROUP, KEY_DIM), (heads, KEY_DIM), (heads, VALUE_DIM))
    return tuple(torch.randn(batch, n, length, dim, generator=generator) for n, dim in shapes)


def dense(query, key, value, capacities, sinks, scale=None):
    """Every position under the per-head mask, with stock attention."""
    mask = window_mask(capacities, sinks, query.shape[2]).repeat_interleave(GROUP, 0)
    key, value = key.repeat_interleave(GROUP, 1), value.repeat_interleave(GROUP, 1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask[None], scale=scale)


def poisoned(capacities, sinks=4, batch=1, layers=1):
    """A store whose unused slots hold NaN: whoever reads one, sees it."""
    heads = len(capacities)
    store = RaggedStore(
        spec_of(layers, heads), torch.tensor([capacities] * layers), num_sink_tokens=sinks, batch_size=batch
    )
    for arena in (*store.keys, *store.values):
        arena.fill_(float("nan"))
    return store


def decode_all(store, query, key, value, start=0, layer=0, **options):
    """Outputs of the tokens from `start` on, one at a time; lengths are checked after each."""
    outputs = []
    for t in range(start, query.shape[2]):
        outputs.append(store.decode(layer, *(x[:, :, t : t + 1] for x in (query, key, value)), **options))
        assert bool((store.lengths <= store.capacities).all())
        assert store.lengths[layer].tolist() == [min(t + 1, c) for c in store.capacities[layer].tolist()]
    return torch.cat(outputs, 2)


def tokens_held(store, head, key, layer=0):
    """Which tokens of `key` the slots of one head hold, in slot order."""
    start, length = int(store.starts[layer, head]), int(store.lengths[layer, head])
    held = store.keys[layer][0, start : start + length]
    return [(key[0, head] == row).all(1).nonzero().item() for row in held]


@pytest.mark.parametrize(
    ("seen", "slots"),
    [
        (1, [0]),
        (5, [0, 1, 2, 3, 4]),
        (6, [0, 1, 5, 3, 4]),
        (8, [0, 1, 5, 6, 7]),
        (9, [0, 1, 8, 6, 7]),
        (12, [0, 1, 11, 9, 10]),
    ],
)
@pytest.mark.parametrize("how", ["decode", "fill", "fill_then_decode"])
def test_ring_slots_of_capacity_5_with_2_sinks(seen, slots, how):
    query, key, value = tensors(seen)
    store = poisoned([5, 9], sinks=2)
    filled = {"decode": 0, "fill": seen, "fill_then_decode": seen // 2}[how]
    if filled:
        store.fill(0, key[:, :, :filled], value[:, :, :filled])
    if filled < seen:
        decode_all(store, query, key, value, start=filled)
    assert tokens_held(store, 0, key) == slots
    assert sorted(tokens_held(store, 1, key)) == [t for t in range(seen) if t < 2 or t >= seen - 7]


LENGTH = 24
CAPACITIES = [[5, 5], [5, 24], [24, 24], [23, 25], [6, 40], [17, 9]]


@pytest.mark.parametrize("capacities", CAPACITIES, ids=str)
def test_decoding_equals_dense_attention_under_the_mask(capacities):
    given = tensors(LENGTH)
    outputs = decode_all(poisoned(capacities), *given)
    torch.testing.assert_close(outputs, dense(*given, capacities, 4), rtol=0, atol=2e-6)


@pytest.mark.parametrize("prompt", [1, 4, 5, 11, LENGTH - 1])
@pytest.mark.parametrize("capacities", CAPACITIES, ids=str)
def test_decoding_after_a_prompt_equals_decoding_alone(capacities, prompt):
    query, key, value = tensors(LENGTH)
    alone = decode_all(poisoned(capacities), query, key, value)
    store = poisoned(capacities)
    store.prefill(0, *(x[:, :, :prompt] for x in (query, key, value)))
    after = decode_all(store, query, key, value, start=prompt)
    torch.testing.assert_close(after, alone[:, :, prompt:], rtol=0, atol=2e-6)


def test_prefill_attends_densely_whatever_is_kept():
    given = tensors(LENGTH)
    out = poisoned([5, 7]).prefill(0, *given)
    torch.testing.assert_close(out, dense(*given, [LENGTH, LENGTH], 4), rtol=0, atol=2e-6)


def test_a_scale_is_used_in_prefill_and_in_decoding():
    query, key, value = tensors(LENGTH)
    expected = dense(query, key, value, [9, 12], 4, scale=0.05)
    outputs = decode_all(poisoned([9, 12]), query, key, value, scale=0.05)
    torch.testing.assert_close(outputs, expected, rtol=0, atol=2e-6)
    prompt = poisoned([LENGTH, LENGTH]).prefill(0, query, key, value, scale=0.05)
    torch.testing.assert_close(prompt, dense(query, key, value, [LENGTH] * 2, 4, scale=0.05), rtol=0, atol=2e-6)


def test_a_batch_of_2_gives_what_its_rows_give():
    given = tensors(LENGTH, batch=2)
    store = poisoned([7, 13], batch=2)
    prompt = store.prefill(0, *(x[:, :, :10] for x in given))
    both = decode_all(store, *given, start=10)
    for row in range(2):
        single = poisoned([7, 13])
        alone = tuple(x[row : row + 1] for x in given)
        torch.testing.assert_close(prompt[row : row + 1], single.prefill(0, *(x[:, :, :10] for x in alone)))
        torch.testing.assert_close(both[row : row + 1], decode_all(single, *alone, start=10), rtol=0, atol=2e-6)
    assert not torch.allclose(both[0], both[1])


def test_layers_count_their_tokens_apart():
    store = poisoned([6, 9], layers=3)
    query, key, value = tensors(8)
    store.prefill(1, query, key, value)
    decode_all(store, query[:, :, :2], key, value, layer=2)
    assert store.lengths.tolist() == [[0, 0], [6, 8], [2, 2]]


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_nbytes_is_the_sum_of_the_storages(dtype, size):
    capacities = torch.tensor([[5, 30], [12, 7], [9, 9]])
    store = RaggedStore(spec_of(3), capacities, batch_size=2, dtype=dtype)
    held = [x for x in vars(store).values() if isinstance(x, torch.Tensor)]
    held += [x for values in vars(store).values() if isinstance(values, list) for x in values if torch.is_tensor(x)]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in held}
    entries = 2 * int(capacities.sum()) * (KEY_DIM + VALUE_DIM) * size
    tables = 8 * (capacities.numel() + 3 * (HEADS + 1))
    assert store.nbytes == sum(storages.values()) == entries + tables


def test_the_store_holds_no_more_after_a_long_sequence():
    store, (query, key, value) = poisoned([5, 9]), tensors(60)
    before = store.nbytes
    store.prefill(0, *(x[:, :, :40] for x in (query, key, value)))
    decode_all(store, query, key, value, start=40)
    assert store.nbytes == before
    assert store.keys[0].shape == (1, 14, KEY_DIM)


def test_a_second_prompt_is_refused():
    store, given = poisoned([5, 9]), tensors(8)
    store.prefill(0, *given)
    with pytest.raises(BudgetError, match="layer 0 already holds tokens"):
        store.prefill(0, *given)


@pytest.mark.parametrize(
    ("capacities", "sinks"),
    [([[4, 9]], 4), ([[0, 9]], 0), ([[9, 9], [9, 9]], 4), ([[9]], 4)],
    ids=["sinks alone", "nothing", "a layer too many", "a head too few"],
)
def test_capacities_that_do_not_fit_are_refused(capacities, sinks):
    with pytest.raises(BudgetError, match="capacities must be"):
        RaggedStore(spec_of(), torch.tensor(capacities), num_sink_tokens=sinks)


@st.composite
def cases(draw):
    sinks = draw(st.integers(0, 4))
    heads = draw(st.integers(1, 3))
    capacities = draw(st.lists(st.integers(sinks + 1, 20), min_size=heads, max_size=heads))
    length = draw(st.integers(1, 26))
    return capacities, sinks, length, draw(st.integers(0, length))


@settings(max_examples=60, deadline=None)
@given(cases())
def test_any_table_equals_dense_attention_under_the_mask(case):
    capacities, sinks, length, prompt = case
    query, key, value = tensors(length, heads=len(capacities), seed=length)
    store = poisoned(capacities, sinks=sinks)
    if prompt:
        store.prefill(0, *(x[:, :, :prompt] for x in (query, key, value)))
        assert store.lengths[0].tolist() == [min(prompt, c) for c in capacities]
    if prompt == length:
        return
    after = decode_all(store, query, key, value, start=prompt)
    expected = dense(query, key, value, capacities, sinks)[:, :, prompt:]
    torch.testing.assert_close(after, expected, rtol=0, atol=2e-6)
