"""What the tests of saved caches share."""

import dataclasses

import torch

from kvpolicy import BudgetPlan, ModelSpec
from kvpolicy.budget.plan_parts import PlanLevel
from kvpolicy.cache.arena import LayerArena
from kvpolicy.integrations.transformers.cache.budgeted_layer import BudgetedLayer
from tests.tiny import over

PROMPT, STEPS = 48, [1] * 6 + [7] + [1] * 10 + [2] + [1] * 2
LENGTH = PROMPT + sum(STEPS)


def plan_of(model, levels=(0.2, 0.5), policy="streaming"):
    """A plan whose shares differ between KV heads and between its levels."""
    spec = ModelSpec.from_config(model.config)
    plan = BudgetPlan.from_capacities(spec, torch.full(spec.table_shape, 100), 1000, policy=policy)
    slope = torch.linspace(-0.6, 0.6, spec.num_budgeted_layers * spec.num_kv_heads, dtype=torch.float64)
    shares = [level * (1 + slope.roll(i).view(spec.table_shape)) for i, level in enumerate(levels)]
    return dataclasses.replace(plan, levels=tuple(map(PlanLevel, levels, shares)))


def left_padded(batch):
    """A mask [batch, LENGTH] with padding before each row's first token, another number in each."""
    mask = torch.ones(batch, LENGTH, dtype=torch.int64)
    for row in range(1, batch):
        mask[row, : 5 * row] = 0
    return mask


@torch.no_grad()
def feed(model, cache, ids, steps, mask=None):
    """Logits of the next tokens of `ids`, in forwards of `steps`."""
    parts = []
    for count in steps:
        begin = cache.get_seq_length()
        seen = None if mask is None else mask[:, : begin + count]
        part = ids[:, begin : begin + count]
        parts.append(model(part, **over(cache), attention_mask=seen).logits)
    return torch.cat(parts, 1)


def facts(cache):
    """Every attribute that can matter, by name: the entries of an arena by position, not how they lie in memory."""
    found = {}

    def add(owner, prefix, without=()):
        for name, value in vars(owner).items():
            if name in without:
                continue
            if isinstance(owner, LayerArena) and name in owner.entries:
                rows = owner.padded_rows().gather(1, owner.padded_positions().argsort(1))
                value = value[rows[rows >= 0]]
            if dataclasses.is_dataclass(value) and not isinstance(value, type):
                value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
            found[f"{prefix}.{name}"] = value

    parts = ("layers", "budgeted", "state", "store", "make_store", "attached", "recipe", "_is_user_defined", "_touched")
    of_a_step = ("replays", "rings", "_handle", "_stepped")
    add(cache, "cache", (*parts, *of_a_step))
    found["recipe"], found["deltas"] = cache.recipe.to_json(), cache.state.deltas
    parts = ("rows", "layers", "schedule", "split", "policy")
    add(cache.store, "store", (*parts, "_planned", "_tables", "_wrong", "first_token"))  # no step is under way
    add(cache.store.rows, "rows", ("schedule", "split"))
    for index, layer in enumerate(cache.store.layers):
        add(layer, f"store.{index}", ("arena", "is_ring"))
        of_a_graph = ("_placed", "layout", "_new_scores")
        add(layer.arena, f"arena.{index}", (*of_a_graph, "start", "allocated", "cursor", "moves"))
    for index, layer in enumerate(cache.layers):
        add(layer, f"layer.{index}", ("_cache",) if isinstance(layer, BudgetedLayer) else ())
    return found


def assert_same(one, other, path="", slack=0.0):
    """slack: of numbers that attention has made: entries in another order are summed up in another order"""
    assert type(one) is type(other), path
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and one.shape == other.shape, path
        is_close = bool(slack) and one.is_floating_point() and torch.allclose(one, other, rtol=0, atol=slack)
        assert torch.equal(one, other) or is_close, path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_same(one[key], other[key], f"{path}.{key}", slack)
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{path}[{index}]", slack)
    else:
        assert one == other, path
