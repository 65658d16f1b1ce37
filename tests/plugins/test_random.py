import pytest
import torch
from kvpolicy_baselines.random import RandomPolicy

from kvpolicy import LayerActivations
from kvpolicy.testing import check_eviction_policy
from tests.cache.play import store_of, tensors
from tests.plugins.direct import after_prompt, assert_keeps_the_best, best, ids_of, kept


def lot(seed, layer, head, position):
    """In whole numbers."""

    def mixed(x):
        x %= 2**32
        x = (x ^ x >> 16) * 0x7FEB352D % 2**32
        x = (x ^ x >> 15) * 0x046CA68B % 2**32
        return x ^ x >> 16

    return mixed(position ^ mixed(head ^ mixed(layer ^ seed * 0x9E3779B1 % 2**32))) % 2**24 / 2**24


def scores(policy, length, *, layer=0, heads=2):
    positions = torch.arange(length).expand(1, heads, -1)
    return policy.score_prompt(LayerActivations(layer=layer, positions=positions))[0]


def test_laws():
    check_eviction_policy(RandomPolicy)
    check_eviction_policy(RandomPolicy(seed=-3))


@pytest.mark.parametrize("seed", [0, 7, -1, 2**70])
def test_the_lots_are_what_they_were(seed):
    for layer in (0, 5):
        expected = [[lot(seed, layer, head, p) for p in range(100)] for head in range(2)]
        assert scores(RandomPolicy(seed=seed), 100, layer=layer).tolist() == expected


def test_the_best_lots_are_kept():
    def formula(layer, head, attention, key):
        return [lot(0, layer, head, position) for position in range(len(key))]

    assert_keeps_the_best("random", formula, sinks=4)


def test_lots_are_uniform_and_independent():
    count = 20000
    drawn = [
        *scores(RandomPolicy(), count, heads=3),
        *scores(RandomPolicy(), count, layer=1, heads=3),
        *scores(RandomPolicy(seed=1), count, heads=3),
    ]
    for own in drawn:
        bins = torch.histc(own, 20, 0, 1)
        assert float(((bins - count / 20) ** 2 / (count / 20)).sum()) < 44, "chi-square, 19 degrees, p = 0.001"
    everything = torch.stack([*drawn, drawn[0].roll(1), drawn[0].roll(2)])
    related = torch.corrcoef(everything) - torch.eye(len(everything))
    assert float(related.abs().max()) < 4.5 / count**0.5


def test_an_entry_has_the_same_lot_in_every_chunk_and_row():
    store = store_of(RandomPolicy(num_sink_tokens=0), [8, 12], batch_size=2)
    given = tensors(60, batch=2)
    held = {head: [] for head in range(2)}
    for begin, end in ((0, 20), (20, 21), (21, 60)):  # every chunk by itself
        store.prefill(0, *(x[:, :, begin:end] for x in given))
        for head, capacity in enumerate((8, 12)):
            every = {p: lot(0, 0, head, p) for p in [*held[head], *range(begin, end)]}
            held[head] = best(every, capacity, seen=end)
            for row in range(2):
                assert sorted(store.positions(0)[row * 2 + head].tolist()) == held[head]
    # chunks make no difference in the end: a lot that loses once would lose again
    assert held[0] == best({p: lot(0, 0, 0, p) for p in range(60)}, 8, seen=60)


def test_decoded_tokens_have_their_lots_too():
    store, given = store_of(RandomPolicy(num_sink_tokens=0), [[1, 1, 1], [8, 12, 9]], batch_size=2), tensors(60, 2, 3)
    for layer in range(2):
        store.prefill(layer, *(x[:, :, :20] for x in given))
    held = [
        best({p: lot(0, 1, head, p) for p in range(20)}, capacity, seen=20) for head, capacity in enumerate((8, 12, 9))
    ]
    for token in range(20, 60):
        for layer in range(2):
            store.decode(layer, *(x[:, :, token : token + 1] for x in given))
        for head, capacity in enumerate((8, 12, 9)):
            stay = best({p: lot(0, 1, head, p) for p in held[head]}, capacity - 1, seen=token)
            held[head] = sorted([*stay, token])
            for row in range(2):
                assert sorted(store.positions(1)[row * 3 + head].tolist()) == held[head]
    # but for the last token, which had to come in, what a prompt of as many tokens keeps of them
    for head, capacity in enumerate((8, 12, 9)):
        assert held[head][:-1] == best({p: lot(0, 1, head, p) for p in range(59)}, capacity - 1, seen=60)


def test_seeds_keep_different_entries():
    ids = ids_of(60)
    first, same, other = (kept(after_prompt(ids, RandomPolicy(seed=seed), retention=0.3)) for seed in (0, 0, 1))
    assert first == same != other
