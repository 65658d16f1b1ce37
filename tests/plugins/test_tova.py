import pytest
import torch
from kvpolicy_baselines.tova import TOVAPolicy

from kvpolicy import LayerActivations
from kvpolicy.testing import check_eviction_policy
from tests.cache.play import GROUP, store_of, tensors
from tests.plugins.direct import assert_keeps_the_best, best, ids_of, observed, softmax


def test_laws():
    check_eviction_policy(TOVAPolicy)
    check_eviction_policy(TOVAPolicy(observation_window=4))


@pytest.mark.parametrize("window", [1, 3])
def test_a_prompt_keeps_what_its_last_query_attends_to_in_all_heads(window):
    layers = [attention[:, -window:].double().sum((0, 1)).tolist() for attention, _ in observed(ids_of(60))]
    name = "tova" if window == 1 else TOVAPolicy(observation_window=window)
    cache = assert_keeps_the_best(name, lambda layer, head, attention, key: layers[layer])
    for layer in range(3):
        first, second = (sorted(p.tolist()) for p in cache.store.positions(layer))
        assert first == second, "one set of tokens in a layer"


def simulated(capacities, sinks, prompt=24, tokens=48):
    """What each KV head of one layer holds after each step, by loops; row by row of a batch."""

    def keep(own, scores, count, seen):
        return best({p: scores[p] for p in own}, count, seen=seen, sinks=sinks)

    query, key, _ = tensors(tokens, batch=2, heads=len(capacities))
    history = []
    for row in range(2):
        held, scores = [list(range(prompt)) for _ in capacities], {}
        for end in range(prompt, tokens + 1):
            if end > prompt:
                held = [
                    [*keep(own, scores, count - 1, end), end - 1] for own, count in zip(held, capacities, strict=True)
                ]
            scores = dict.fromkeys(range(end), 0.0)
            for head, own in enumerate(held):
                keys = {p: key[row, head, p].double().tolist() for p in own}
                for member in range(head * GROUP, head * GROUP + GROUP):
                    weights = softmax(query[row, member, end - 1].double().tolist(), list(keys.values()))
                    for p, weight in zip(keys, weights, strict=True):
                        scores[p] += weight
            held = [keep(own, scores, count, end) for own, count in zip(held, capacities, strict=True)]
            history.append([sorted(own) for own in held])
    return history


def played(capacities, sinks, prompt=24, tokens=48):
    """The same of a store, whose two rows decode side by side."""
    given = tensors(tokens, batch=2, heads=len(capacities))
    store = store_of(TOVAPolicy(num_sink_tokens=sinks), capacities, batch_size=2)
    history = []
    for begin, end in ((0, prompt), *((p, p + 1) for p in range(prompt, tokens))):
        (store.prefill if begin == 0 else store.decode)(0, *(x[:, :, begin:end] for x in given))
        history.append([sorted(p.tolist()) for p in store.positions(0)])
    heads = len(capacities)
    return [step[row * heads : row * heads + heads] for row in range(2) for step in history]


@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("capacities", [[11, 11], [9, 13], [12, 5, 8]])
def test_decoding_drops_what_the_query_before_attended_to_least(capacities, sinks):
    history = played(capacities, sinks)
    assert history == simulated(capacities, sinks)
    for held in history:
        smaller, *larger = sorted(held, key=len)
        assert all(set(smaller) <= set(other) for other in larger), "equal sets, or one inside the other"
    last = history[-1][0]
    assert max(set(range(48)) - set(last)) >= 24, "decoded tokens go as well"
    assert last[:sinks] == list(range(sinks))


def test_a_head_that_does_not_hold_a_token_pays_it_nothing():
    mass = torch.tensor([[[0.5, 0.25, 0.25], [1.0, 0.0, 2.0]], [[3.0, 4.0, 5.0], [6.0, 7.0, 0.0]]])
    positions = torch.tensor([[[4, 0, 9], [9, -1, 4]], [[0, 1, 2], [1, 0, -1]]])
    scores = TOVAPolicy().score_prompt(LayerActivations(layer=0, window_attention=mass, positions=positions))
    assert (scores * 2).tolist() == [[[2.5, 0.25, 1.25], [1.25, 0.0, 2.5]], [[10.0, 10.0, 5.0], [10.0, 10.0, 0.0]]]
