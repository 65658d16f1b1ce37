import torch
from kvpolicy_baselines.h2o import H2OPolicy

from kvpolicy.testing import check_eviction_policy
from tests.cache.play import store_of, tensors
from tests.plugins.direct import assert_decodes_like, assert_keeps_the_best, softmax


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


def test_a_later_chunk_counts_its_own_queries():
    query, key, value = tensors(40)
    store = store_of(H2OPolicy(recent_window=0), [12, 12])
    store.prefill(0, *(x[:, :, :24] for x in (query, key, value)))
    before = [positions.tolist() for positions in store.positions(0)]
    store.prefill(0, *(x[:, :, 24:] for x in (query, key, value)))
    for head, old in enumerate(before):
        scores = dict.fromkeys([*old, *range(24, 40)], 0.0)
        for row in query[0, head * 3 : head * 3 + 3].double().tolist():
            for position in range(24, 40):
                seen = [*old, *range(24, position + 1)]
                for other, weight in zip(seen, softmax(row[position], key[0, head, seen].tolist()), strict=True):
                    scores[other] += weight
        best = torch.tensor(sorted(scores, key=scores.get)[-12:]).sort().values
        assert torch.equal(store.positions(0)[head].sort().values, best)


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
