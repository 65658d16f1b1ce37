"""What a method keeps by its formula, in plain Python: the other side of the tests of methods."""

import math

import torch
from transformers import DynamicCache

import kvpolicy
from tests.cache.play import GROUP, store_of, tensors
from tests.tiny import over, tiny_model


def best(scores, count, *, seen, sinks=0, recent=0):
    """The positions that stay. scores: {position: score}; at equal scores the more recent one does."""

    def rank(position):
        tier = 2 if position < sinks else 1 if position >= seen - recent else 0
        return tier, 0.0 if tier else scores[position], position

    return sorted(sorted(scores, key=rank, reverse=True)[:count])


def softmax(query, keys):
    """Attention of one query over some keys; lists of numbers."""
    logits = [sum(a * b for a, b in zip(query, key, strict=True)) / math.sqrt(len(query)) for key in keys]
    weights = [math.exp(x - max(logits)) for x in logits]
    return [x / sum(weights) for x in weights]


def cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.hypot(*a) / math.hypot(*b)


# --- through a model


def ids_of(length):
    """Tokens `[1, length]` that repeat late: in the first layer, keys of equal tokens are equally long."""
    generator = torch.Generator().manual_seed(length)
    rounds = [torch.randperm(94, generator=generator) + 3 for _ in range(0, length, 94)]
    return torch.cat(rounds)[None, :length]


def observed(ids, **options):
    """(attention [num_q_heads, T, T], key [H, T, D]) of each layer of the tiny Llama, by its own eager attention."""
    model, cache = tiny_model("Llama", attention="eager", **options), DynamicCache()
    with torch.no_grad():
        attentions = model(ids, **over(cache), output_attentions=True).attentions
    return [(a[0], layer.keys[0]) for a, layer in zip(attentions, cache.layers, strict=True)]


def after_prompt(ids, policy, *, mask=None, **options):
    """A cache of the tiny Llama after one forward."""
    model = tiny_model("Llama")
    cache = kvpolicy.new_cache(model, policy=policy, min_tokens=8, **options)
    with torch.no_grad():
        model(ids, attention_mask=mask, **over(cache))
    return cache


def kept(cache):
    """{(layer, segment): positions}"""
    layers = range(cache.spec.num_budgeted_layers)
    return {(i, s): sorted(p.tolist()) for i in layers for s, p in enumerate(cache.store.positions(i))}


def assert_keeps_the_best(policy, formula, *, length=60, retention=0.3, sinks=0, recent=0, **options):
    """formula: (layer, head, attention [GROUP, T, T], key [T, D]) to the score of each position.

    The total is the budget's, and neither the recency rule nor another order would keep the same. Returns the cache.
    """
    ids = ids_of(length)
    cache = after_prompt(ids, policy, retention=retention, **options)
    expected = {}
    for layer, (attention, key) in enumerate(observed(ids)):
        group = len(attention) // len(key)
        for head in range(len(key)):
            scores = formula(layer, head, attention[head * group : (head + 1) * group], key[head])
            count = int(cache.capacities[layer, 0, head])
            expected[layer, head] = best(dict(enumerate(scores)), count, seen=length, sinks=sinks, recent=recent)
    assert kept(cache) == expected
    assert int(cache.lengths.sum()) == round(retention * length * 3 * 2)
    for positions in expected.values():
        assert positions != list(range(length - len(positions), length)), "no more than recency"
    return cache


# --- through a store, token by token


def assert_decodes_like(policy, prompt_scores, step_scores, *, new=math.inf, sinks=0, recent=0, prompt=24):
    """One layer of two KV heads at capacities of their own, over a prompt and what is decoded up to 48 tokens.

    prompt_scores: (queries [GROUP][n], keys [n]) to the score of each position
    step_scores:   (scores {position: score}, queries [GROUP], keys {position: key}) to the scores after a step
    new:           the score of a decoded token before its first step
    """
    capacities, tokens = (9, 13), 48
    data = tensors(tokens)
    query, key = data[0][0].double().tolist(), data[1][0].double().tolist()
    store = store_of(policy, list(capacities))
    store.prefill(0, *(x[:, :, :prompt] for x in data))
    held = []
    for head, capacity in enumerate(capacities):
        queries = [query[head * GROUP + g][:prompt] for g in range(GROUP)]
        scores = dict(enumerate(prompt_scores(queries, key[head][:prompt])))
        held.append({p: scores[p] for p in best(scores, capacity, seen=prompt, sinks=sinks, recent=recent)})
    assert _positions(store) == [sorted(scores) for scores in held]
    for position in range(prompt, tokens):
        store.decode(0, *(x[:, :, position : position + 1] for x in data))
        for head, scores in enumerate(held):
            stay = best(scores, capacities[head] - 1, seen=position + 1, sinks=sinks, recent=recent)
            scores = {p: scores[p] for p in stay} | {position: new}
            queries = [query[head * GROUP + g][position] for g in range(GROUP)]
            held[head] = step_scores(scores, queries, {p: key[head][p] for p in scores})
        assert _positions(store) == [sorted(scores) for scores in held], position
    return [sorted(scores) for scores in held]


def _positions(store):
    return [sorted(positions.tolist()) for positions in store.positions(0)]
