import pytest
import torch
from kvpolicy_baselines.corm import CORMPolicy

from kvpolicy import LayerActivations, PluginError
from kvpolicy.testing import check_eviction_policy
from tests.cache.play import GROUP, store_of, tensors
from tests.plugins.direct import assert_keeps_the_best, best, softmax

SMALL = {"observation_window": 6, "recent_window": 3}


def marks(weights):
    """Which of t entries a query marks. weights: [GROUP][t], each summing up to one."""
    share = 1 / len(weights[0])
    return [sum(column) / len(column) >= share for column in zip(*weights, strict=True)]


def of_model(window):
    """The last query that marked each position, plus one, by the attention of a model."""

    def scores(layer, head, attention, key):
        last = [0] * len(key)
        for asking in range(len(key) - window, len(key)):
            weights = attention[:, asking, : asking + 1].double().tolist()
            for position, marked in enumerate(marks(weights)):
                last[position] = asking + 1 if marked else last[position]
        return last

    return scores


def test_laws():
    check_eviction_policy(CORMPolicy)
    check_eviction_policy(CORMPolicy(**SMALL))


def test_the_defaults_keep_what_was_marked_last_and_the_window():
    assert_keeps_the_best("corm", of_model(32), length=160, retention=0.4, recent=32)


@pytest.mark.parametrize("window", [1, 6])
def test_windows(window):
    assert_keeps_the_best(CORMPolicy(observation_window=window, recent_window=0), of_model(window))


def simulated(parts, capacities, window, recent):
    """(held, marks) of each KV head after each part. marks: {position: every query that marked it}."""
    query, key, _ = tensors(parts[-1][1])
    held, history = [{} for _ in capacities], []
    for begin, end in parts:
        for head, capacity in enumerate(capacities):
            own = held[head]
            if end == begin + 1 and len(own) == capacity:  # room is made before the token attends
                rank = {p: max(asked, default=-1) for p, asked in own.items()}
                own = {p: own[p] for p in best(rank, capacity - 1, seen=end, recent=recent)}
            own = own | {p: [] for p in range(begin, end)}
            for asking in range(max(begin, end - window), end):
                seen = [p for p in own if p <= asking]
                keys = key[0, head, seen].double().tolist()
                rows = query[0, head * GROUP : head * GROUP + GROUP, asking].double().tolist()
                for p, marked in zip(seen, marks([softmax(row, keys) for row in rows]), strict=True):
                    own[p] = [*own[p], asking] if marked else own[p]
            rank = {p: max(asked, default=-1) for p, asked in own.items()}
            held[head] = {p: own[p] for p in best(rank, capacity, seen=end, recent=recent)}
        history.append([dict(own) for own in held])
    return history


def test_chunks_and_decoding_give_up_what_was_passed_over_longest():
    decoded = [(p, p + 1) for p in range(40, 70)]
    parts = [(0, 24), (24, 40), *decoded, (70, 82), (82, 83), (83, 84)]
    given, store = tensors(84), store_of(CORMPolicy(**SMALL), [12, 17])
    for (begin, end), expected in zip(parts, simulated(parts, (12, 17), 6, 3), strict=True):
        (store.decode if end == begin + 1 else store.prefill)(0, *(x[:, :, begin:end] for x in given))
        scores = store.layers[0].arena.padded_scores()
        for head, positions in enumerate(store.positions(0)):
            own = dict(zip(positions.tolist(), scores[head].tolist(), strict=False))
            assert own == {p: max(asked, default=-1) + 1 for p, asked in expected[head].items()}
    assert len({len(asked) for asked in expected[1].values()}) > 2, "some are marked more often than others"


def test_what_a_query_does_not_see_and_padding_count_for_nothing():
    # two absent entries, two held ones, then padding and three tokens; the last three of them ask
    positions = torch.tensor([[[-1, 0, 3, -1, -1, 5, 6, 7]]])
    mass = torch.zeros(1, 1, 4, 8)
    mass[0, 0, 1, [1, 2, 5]] = torch.tensor([0.6, 0.2, 0.2])  # of position 5, a third is the share
    mass[0, 0, 2, [1, 2, 5, 6]] = torch.tensor([0.25, 0.25, 0.5, 0.0])  # of position 6, a quarter
    mass[0, 0, 3, [1, 2, 5, 6, 7]] = torch.tensor([0.0, 0.19, 0.0, 0.61, 0.2])
    given = LayerActivations(0, positions=positions, query_attention=mass, scores=torch.zeros(1, 1, 8))
    assert CORMPolicy().score_prompt(given)[0, 0].tolist() == [0, 7, 7, 0, 0, 7, 8, 8]


def test_bad_parameters_are_refused():
    with pytest.raises(PluginError, match="corm: observation_window must be at least 1, got 0"):
        CORMPolicy(observation_window=0)
