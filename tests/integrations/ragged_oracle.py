"""Dense attention under one mask per KV head: what a ragged cache under the window rule has to equal."""

from dataclasses import replace

import torch

from kvpolicy import ModelSpec
from kvpolicy.integrations.transformers.attention.attention_modules import attention_modules
from kvpolicy.integrations.transformers.attention.intercept import intercepted
from tests.tiny import over


def visible_tokens(capacities, sinks, steps):
    """bool [L, H, T, T] (query, key) of a sequence fed in `steps` forwards under fixed capacities `[L, H]`.

    A forward of several tokens sees what was kept before it, and itself causally. A single token replaces the worst
    entry first and sees exactly what is held then.
    """
    total = sum(steps)
    visible = torch.zeros(*capacities.shape, total, total, dtype=torch.bool)
    for (layer, head), capacity in zip(
        torch.cartesian_prod(*map(torch.arange, capacities.shape)).tolist(), capacities.flatten().tolist(), strict=True
    ):
        kept, begin = [], 0
        for count in steps:
            new = list(range(begin, begin + count))
            for query in new:
                seen = [*kept, *new[: query - begin + 1]]
                visible[layer, head, query, seen if count > 1 else _window(seen, capacity, sinks)] = True
            kept = _window([*kept, *new], capacity, sinks)
            begin += count
    return visible


def _window(tokens, capacity, sinks):
    """The sink tokens and the most recent ones."""
    if len(tokens) <= capacity:
        return tokens
    first = [token for token in tokens if token < sinks]
    return [*first, *[token for token in tokens if token >= sinks][-(capacity - len(first)) :]]


class MaskedAttention:
    """Scores, softcap, sinks and softmax written out, under a mask per KV head."""

    def __init__(self, visible):
        self.visible = visible  # bool [H, T, T]

    def __call__(self, call):
        query, key, value, options = call.query, call.key, call.value, call.options
        group, rows = query.shape[1] // key.shape[1], query.shape[2]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        scores = query @ key.transpose(-1, -2) * options["scaling"]
        if options.get("softcap") is not None:
            scores = options["softcap"] * torch.tanh(scores / options["softcap"])
        mask = self.visible.repeat_interleave(group, 0)[:, -rows:]
        scores = scores.masked_fill(~mask, float("-inf"))
        if options.get("s_aux") is not None:
            sinks = options["s_aux"].reshape(1, -1, 1, 1).expand(scores.shape[0], -1, rows, 1)
            weights = torch.softmax(torch.cat([scores, sinks], -1), -1)[..., :-1]
        else:
            weights = torch.softmax(scores, -1)
        return (weights @ value).transpose(1, 2), None


@torch.no_grad()
def masked_logits(model, ids, visible, shared_layers=()):
    """Logits [B, T, vocab] of one forward without a cache. visible: bool [L, H, T, T].

    shared_layers: as in `ModelSpec.sharing`; these attend with the keys and values of another layer, which L leaves out
    """
    shared_layers, entries = dict(shared_layers), {}
    spec = ModelSpec.from_config(model.config).sharing(shared_layers)
    budgeted = list(spec.budgeted_layers)
    owners = {i: budgeted.index(x.shared_with) for i, x in enumerate(spec.layers) if x.shared_with in budgeted}
    owners |= {index: row for row, index in enumerate(budgeted)}

    def handler(layer, attend):
        def answer(call):
            entries[layer] = call.key, call.value
            key, value = entries[spec.layers[layer].shared_with if layer in shared_layers else layer]
            return attend(replace(call, key=key, value=value))

        return answer

    handlers = {
        module: handler(layer, MaskedAttention(visible[row]))
        for (module, _), (layer, row) in zip(attention_modules(model, list(owners)), owners.items(), strict=True)
    }
    with intercepted(model, handlers):
        return model(ids, use_cache=False).logits


@torch.no_grad()
def stepped_logits(model, ids, cache, steps, after=None):
    """Logits [B, T, vocab] of `ids` fed in forwards of `steps` tokens. `after(cache)` is called behind each."""
    parts = []
    for part in torch.split(ids, steps, 1):
        parts.append(model(part, **over(cache)).logits)
        if after is not None:
            after(cache)
    return torch.cat(parts, 1)


def ragged_table(spec, low, high, seed=0):
    """int64 [L, H], capacities between `low` and `high`."""
    return torch.randint(low, high + 1, spec.table_shape, generator=torch.Generator().manual_seed(seed))
