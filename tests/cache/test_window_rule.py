"""Decoding through a store equals dense attention under the window rule's mask."""

import pytest
import torch
import torch.nn.functional as F
from kvpolicy_kernels.window_attention.reference import window_mask

from tests.cache.play import GROUP, TOLERANCE, Play, poison, store_of, tensors
from tests.cache.policies import Recent

LENGTH = 24
TABLES = [[5, 5], [5, 24], [24, 24], [23, 25], [6, 40], [17, 9]]


def dense(query, key, value, table, sinks, **options):
    """Every position under the per-head mask, with stock attention."""
    mask = window_mask(table, sinks, query.shape[2]).repeat_interleave(GROUP, 0)
    key, value = key.repeat_interleave(GROUP, 1), value.repeat_interleave(GROUP, 1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask[None], **options)


def decode_all(store, query, key, value, start=0, **options):
    """Outputs of the tokens from `start` on, one at a time; free rows are poisoned before each."""
    outputs = []
    for t in range(start, query.shape[2]):
        outputs.append(store.decode(0, *(x[:, :, t : t + 1] for x in (query, key, value)), **options))
        assert store.lengths[0].tolist() == [[min(t + 1, c) for c in row] for row in store.capacities[0].tolist()]
        poison(store)
    return torch.cat(outputs, 2)


@pytest.mark.parametrize("table", TABLES, ids=str)
def test_decoding_equals_dense_attention_under_the_mask(table):
    given = tensors(LENGTH)
    store = store_of(Recent(4), table)
    first = store.prefill(0, *(x[:, :, :1] for x in given))
    outputs = torch.cat([first, decode_all(store, *given, start=1)], 2)
    torch.testing.assert_close(outputs, dense(*given, table, 4), **TOLERANCE)


@pytest.mark.parametrize("prompt", [1, 4, 5, 11, LENGTH - 1])
@pytest.mark.parametrize("table", TABLES, ids=str)
def test_decoding_after_a_prompt_equals_decoding_alone(table, prompt):
    query, key, value = tensors(LENGTH)
    store = store_of(Recent(4), table)
    out = store.prefill(0, *(x[:, :, :prompt] for x in (query, key, value)))
    poison(store)
    after = decode_all(store, query, key, value, start=prompt)
    torch.testing.assert_close(after, dense(query, key, value, table, 4)[:, :, prompt:], **TOLERANCE)
    causal = dense(query, key, value, [LENGTH, LENGTH], 4)[:, :, :prompt]
    torch.testing.assert_close(out, causal, **TOLERANCE)


def test_a_full_budget_equals_dense_attention_through_prompts_and_decoding():
    query, key, value = given = tensors(LENGTH)
    store, outputs = store_of(Recent(2), [LENGTH, LENGTH]), []
    for begin, end in ((0, 7), (7, 15)):
        outputs.append(store.prefill(0, *(x[:, :, begin:end] for x in given)))
    outputs.append(decode_all(store, query, key, value, start=15))
    torch.testing.assert_close(torch.cat(outputs, 2), dense(*given, [LENGTH, LENGTH], 0), **TOLERANCE)
    assert not store.report().evicted


def test_scale_softcap_and_sink_logits_reach_prompt_and_decoding():
    options = {"scale": 0.4, "softcap": 2.0, "sink_logits": torch.linspace(-1, 2, 2 * GROUP)}
    Play(Recent(2), [6, 9], options=options, softcap=2.0, sinks=True).prompt(8).decode(6).prompt(5)


def test_the_specs_softcap_is_used_by_prefill_and_decode():
    from kvpolicy.cache import RaggedStore
    from kvpolicy.cache.schedule import Fixed
    from tests.cache.play import spec_of

    query, key, value = tensors(6)
    outputs = []
    for softcap in (None, 1.0):
        store = RaggedStore(spec_of(softcap=softcap, scale=0.7), Fixed(torch.tensor([[9, 9]])), Recent())
        outputs.append([store.prefill(0, *(x[:, :, :5] for x in (query, key, value)))])
        outputs[-1].append(store.decode(0, *(x[:, :, 5:] for x in (query, key, value))))
    for plain, capped in zip(*outputs, strict=True):
        assert float((plain - capped).abs().max()) > 1e-3
    expected = dense(query, key, value, [9, 9], 2, scale=0.7)
    torch.testing.assert_close(torch.cat(outputs[0], 2), expected, **TOLERANCE)


@pytest.mark.parametrize("spans", [[], [(5, 9)]], ids=["no spans", "a span"])
@pytest.mark.parametrize("sinks", [0, 1, 3])
def test_prompts_chunks_and_decoding_follow_the_oracle(sinks, spans):
    play = Play(Recent(sinks), [4 + sinks, 7], spans=spans, tokens=80)
    play.prompt(3).prompt(9).decode(12).prompt(1).prompt(14).decode(30)


def test_a_prompt_of_one_token():
    store = store_of(Recent(), [5, 7])
    given = tensors(1)
    torch.testing.assert_close(store.prefill(0, *given), given[2].repeat_interleave(GROUP, 1), **TOLERANCE)
    assert store.lengths.tolist() == [[[1, 1]]]
