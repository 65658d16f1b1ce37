import pytest
import torch
from kvpolicy_baselines.h2o import H2OPolicy

from kvpolicy.testing import check_eviction_policy
from tests.cache.play import store_of, tensors
from tests.plugins.direct import assert_decodes_like, assert_keeps_the_best, best, softmax


def all_queries(layer, head, attention, key):
    """Every weight of the group added up, one at a time."""
    scores = [0.0] * len(key)
    for weights in attention.tolist():
        for row in weights:
            for position, weight in enumerate(row):
                scores[position] += weight
    return scores


def test_laws():
    check_eviction_policy(H2OPolicy)


def test_the_defaults_keep_the_heavy_hitters_and_the_window():
    assert_keeps_the_best("h2o", all_queries, length=160, retention=0.4, recent=32)


def test_without_a_window_the_heavy_hitters_alone():
    assert_keeps_the_best(H2OPolicy(recent_window=0), all_queries)


def attention_so_far(queries, keys):
    scores = [0.0] * len(keys)
    for rows in queries:
        for position, query in enumerate(rows):
            for other, weight in enumerate(softmax(query, keys[: position + 1])):
                scores[other] += weight
    return scores


def and_this_step(scores, queries, keys):
    scores = dict(scores)
    for query in queries:
        for position, weight in zip(keys, softmax(query, list(keys.values())), strict=True):
            scores[position] += weight
    return scores


def test_decoding_without_a_window_starts_from_nothing():
    kept = assert_decodes_like(H2OPolicy(recent_window=0), attention_so_far, and_this_step, new=0.0, prompt=2)
    assert all(47 in positions for positions in kept), "the newest token is in, whatever its score"


def test_decoding_adds_up_over_all_steps():
    kept = assert_decodes_like(H2OPolicy(recent_window=4), attention_so_far, and_this_step, new=0.0, recent=4)
    for positions in kept:
        assert positions[-4:] == [44, 45, 46, 47] and positions[0] < 24, "the window, and heavy hitters of the prompt"


def held_scores(store):
    """{position: score} of each KV head."""
    scores = store.layers[0].arena.padded_scores()
    return [dict(zip(p.tolist(), scores[head].tolist(), strict=False)) for head, p in enumerate(store.positions(0))]


def test_chunks_turns_and_decoding_add_up():
    """Prompt, decoded tokens, another prompt, decoded tokens: the sums of a simulation that never starts over."""
    query, key, value = tensors(60)
    store = store_of(H2OPolicy(recent_window=3), [12, 15])
    sums = [{}, {}]
    for begin, end in ((0, 20), (20, 21), (21, 22), (22, 40), (40, 58), (58, 59), (59, 60)):
        (store.decode if end == begin + 1 else store.prefill)(0, *(x[:, :, begin:end] for x in (query, key, value)))
        for head, capacity in enumerate((12, 15)):
            if end == begin + 1:  # room is made before the token attends
                stay = best(sums[head], capacity - 1, seen=end, recent=3)
                sums[head] = {p: sums[head][p] for p in stay}
            scores = sums[head] | dict.fromkeys(range(begin, end), 0.0)
            for row in query[0, head * 3 : head * 3 + 3].double().tolist():
                for position in range(begin, end):
                    seen = [p for p in scores if p <= position]
                    for p, weight in zip(seen, softmax(row[position], key[0, head, seen].tolist()), strict=True):
                        scores[p] += weight
            sums[head] = {p: scores[p] for p in best(scores, capacity, seen=end, recent=3)}
        for own, expected in zip(held_scores(store), sums, strict=True):
            assert own == pytest.approx(expected, abs=1e-5)
    assert any(p < 20 for p in sums[0]), "the first prompt's heavy hitters outlast three later chunks"


def test_chunks_of_a_prompt_that_fits_change_nothing():
    given = tensors(40)
    whole, chunked = (store_of(H2OPolicy(), [40, 40]) for _ in range(2))
    whole.prefill(0, *given)
    for begin, end in ((0, 7), (7, 8), (8, 30), (30, 40)):
        chunked.prefill(0, *(x[:, :, begin:end] for x in given))
    for own, expected in zip(held_scores(chunked), held_scores(whole), strict=True):
        assert own == pytest.approx(expected, abs=1e-5)


def test_a_decoded_token_starts_with_its_own_attention():
    query, key, value = tensors(5)
    store = store_of(H2OPolicy(), [12, 12])
    store.prefill(0, *(x[:, :, :4] for x in (query, key, value)))
    store.decode(0, *(x[:, :, 4:] for x in (query, key, value)))
    scores = store.layers[0].arena.padded_scores()
    for head in range(2):
        rows = query[0, head * 3 : head * 3 + 3, 4].tolist()
        own = sum(softmax(row, key[0, head].tolist())[4] for row in rows)
        torch.testing.assert_close(float(scores[head][store.positions(0)[head] == 4]), own, rtol=0, atol=1e-5)
