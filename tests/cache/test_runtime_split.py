"""Budgets that are split by the scores of the prompt at hand."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from kvpolicy import BudgetAllocator, BudgetError, PluginError
from kvpolicy.budget.ask import Ask
from kvpolicy.cache import RaggedStore
from kvpolicy.cache.schedule import Fixed, Growing
from kvpolicy.cache.split import RuntimeSplit
from kvpolicy.cache.store import Scoring
from tests.cache.play import spec_of, tensors
from tests.cache.policies import Coarse, Recent, ValueNorm
from tests.cache.snapshot import snapshot

LAYERS, HEADS, SINKS = 3, 2, 2
FLOOR = SINKS + 1


class _TopK(BudgetAllocator):
    """A head's share is the number of its entries among the best of all, its own best `floor` always being in."""

    def shares(self, importance, budget):
        return torch.ones(budget.shape)

    def split(self, scores, budget):
        counts = []
        for row in range(len(scores[0])):
            forced = [_forced(layer[row], floors) for layer, floors in zip(scores, budget.floors(), strict=True)]
            flat = torch.cat([layer.flatten() for layer in forced])
            owner = torch.cat([_owner(layer) + index * HEADS for index, layer in enumerate(forced)])
            best = flat.topk(min(budget.total, int((flat > -torch.inf).sum()))).indices
            counts.append(torch.bincount(owner[best], minlength=len(scores) * HEADS).view(len(scores), HEADS))
        return torch.stack(counts).float()


def _forced(scores, floors):
    scores = scores.clone()
    for head, floor in enumerate(floors.tolist()):
        best = scores[head].topk(min(floor, scores.shape[1])).indices
        scores[head, best] = torch.where(scores[head, best] > -torch.inf, torch.inf, -torch.inf)
    return scores


def _owner(scores):
    return torch.arange(HEADS)[:, None].expand(-1, scores.shape[1]).flatten()


@dataclass(frozen=True, slots=True)
class LayerTopK(_TopK):
    split_scope: ClassVar[str] = "layer"


@dataclass(frozen=True, slots=True)
class ModelTopK(_TopK):
    split_scope: ClassVar[str] = "model"


SCOPES = pytest.mark.parametrize("allocator", [LayerTopK(), ModelTopK()], ids=["layer", "model"])


def growing(retention=0.3, min_tokens=10):
    return Growing(
        (LAYERS, HEADS), lambda kept, context: pytest.fail("its own shares"), Ask(retention, min_tokens=min_tokens), 1
    )


def store_of(allocator, schedule=None, policy=None, **options):
    schedule = schedule or growing()
    split = RuntimeSplit(allocator, schedule, 1)
    return RaggedStore(spec_of(LAYERS, HEADS), schedule, policy or ValueNorm(SINKS), split=split, **options)


def prompts(length, batch=1, seed=0, flipped=False):
    """Tokens of every layer; layers and heads differ in size, so that the budget is split unevenly."""
    layers = [tensors(length, batch, HEADS, seed * 100 + layer) for layer in range(LAYERS)]
    for layer, (_, _, value) in enumerate(layers):
        value *= torch.tensor([1.0, 0.5 + (LAYERS - 1 - layer if flipped else layer)])[:, None, None]
    return layers


def feed(store, given, **options):
    for layer, tokens in enumerate(given):
        store.prefill(layer, *tokens, **options)
    return store


def kept(store):
    """{(row, layer, head): positions}."""
    return {
        (segment // HEADS, layer, segment % HEADS): sorted(positions.tolist())
        for layer in range(LAYERS)
        for segment, positions in enumerate(store.positions(layer))
    }


def offline(given, total, floors, row=0):
    """One choice over all layers of `given` at once: sink tokens, each head's best up to its floor, then the best."""
    chosen, rest = {}, []
    for layer, (_, _, value) in enumerate(given):
        for head in range(HEADS):
            norm = value[row, head].norm(dim=-1).tolist()
            order = sorted(range(len(norm)), key=lambda p: (p < SINKS, norm[p], p), reverse=True)
            floor = int(floors[layer, head])
            chosen[row, layer, head] = order[:floor]
            rest += [(norm[p], p, layer, head) for p in order[floor:]]
    left = total - sum(map(len, chosen.values()))
    for _, position, layer, head in sorted(rest, reverse=True)[:left]:
        chosen[row, layer, head].append(position)
    return {key: sorted(positions) for key, positions in chosen.items()}


def test_model_scope_is_one_choice_over_all_layers():
    given = prompts(50)
    store = feed(store_of(ModelTopK()), given)
    total = round(0.3 * 50 * LAYERS * HEADS)
    assert kept(store) == offline(given, total, torch.full((LAYERS, HEADS), FLOOR))
    assert torch.equal(store.lengths, store.capacities) and int(store.lengths.sum()) == total
    assert int(store.lengths.min()) == FLOOR, "a head is at its floor"
    assert len(store.lengths.unique()) >= 4


def test_layer_scope_is_one_choice_in_each_layer():
    given = prompts(50)
    store = feed(store_of(LayerTopK(), growing(0.303)), given)
    total = round(0.303 * 50 * LAYERS * HEADS)
    assert store.lengths.sum((1, 2)).tolist() == [31, 30, 30] and total == 91
    for layer in range(LAYERS):
        only = [(None, None, torch.zeros(1, HEADS, 0, 6))] * LAYERS
        only[layer] = given[layer]
        floors = torch.zeros(LAYERS, HEADS, dtype=torch.int64)
        floors[layer] = FLOOR
        expected = offline(only, 31 if layer == 0 else 30, floors)
        assert [kept(store)[0, layer, head] for head in range(HEADS)] == [expected[0, layer, h] for h in range(HEADS)]


def test_earlier_layers_only_shrink_and_the_peak_is_the_budget():
    store, total = store_of(ModelTopK()), round(0.3 * 50 * LAYERS * HEADS)
    held = []
    for layer, tokens in enumerate(prompts(50)):
        store.prefill(layer, *tokens)
        held.append(kept_so_far(store, layer))
        floors = FLOOR * HEADS * (LAYERS - 1 - layer)
        assert int(store.lengths.sum()) == total - floors
        for earlier in range(layer):
            for head in range(HEADS):
                assert held[-1][earlier, head] <= held[-2][earlier, head], "nothing returns"
    assert held[0][0, 0] > held[2][0, 0] or held[0][0, 1] > held[2][0, 1]


def kept_so_far(store, last):
    return {
        (layer, head): set(positions.tolist())
        for layer in range(last + 1)
        for head, positions in enumerate(store.positions(layer))
    }


@SCOPES
def test_rows_of_different_length_are_what_they_are_alone(allocator):
    given, lengths = prompts(60, batch=3), (60, 25, 41)
    padded = [tuple(x.clone() for x in tokens) for tokens in given]
    for tokens in padded:
        for row, length in enumerate(lengths):
            for x in tokens:
                x[row, :, : 60 - length] = 1e3
    store = feed(store_of(allocator, batch_size=3), padded, num_padding=[60 - n for n in lengths])
    together = kept(store)
    for row, length in enumerate(lengths):
        alone = feed(
            store_of(allocator), [tuple(x[row : row + 1, :, 60 - length :] for x in tokens) for tokens in given]
        )
        for (_, layer, head), positions in kept(alone).items():
            assert together[row, layer, head] == positions
        assert torch.equal(store.capacities[:, row], alone.capacities[:, 0])


def decode(store, count):
    given = prompts(count, store.batch_size, seed=7)
    for t in range(count):
        for layer, tokens in enumerate(given):
            store.decode(layer, *(x[:, :, t : t + 1] for x in tokens))
        assert bool((store.lengths <= store.capacities).all())


@SCOPES
def test_decoding_grows_what_the_prompt_found(allocator):
    store = feed(store_of(allocator), prompts(50))
    prompt = store.capacities
    decode(store, 63)
    assert torch.equal(store.capacities, prompt)
    for seen in (114, 178):
        before = store.capacities
        decode(store, 1 if seen == 114 else 64)
        assert int(store.capacities.sum()) == round(0.3 * seen * LAYERS * HEADS)
        assert bool((store.capacities >= before).all())
        if allocator.split_scope == "layer":
            sums = store.capacities.sum((1, 2))
            assert int(sums.max() - sums.min()) <= 1
    proportions = store.capacities / prompt
    assert float(proportions.max() / proportions.min()) < 1.5


@SCOPES
def test_a_second_prompt_splits_what_is_new(allocator):
    first, second = prompts(50), prompts(40, seed=3, flipped=True)
    store = feed(store_of(allocator), first)
    before, held = store.capacities, kept(store)
    feed(store, second)
    total = round(0.3 * 90 * LAYERS * HEADS)
    assert int(store.capacities.sum()) == total and torch.equal(store.lengths, store.capacities)
    assert bool((store.capacities >= before).all()) and bool((store.capacities == before).any()), "one is at its floor"
    for key, positions in kept(store).items():
        assert {p for p in positions if p < 50} <= set(held[key])
    if allocator.split_scope == "model":
        whole = [
            tuple(torch.cat([x, y], 2) for x, y in zip(*both, strict=True)) for both in zip(first, second, strict=True)
        ]
        for layer, (_, _, value) in enumerate(whole):  # what was evicted is as good as absent
            for head in range(HEADS):
                gone = sorted(set(range(50)) - set(held[0, layer, head]))
                value[0, head, gone] = 0
        assert kept(store) == offline(whole, total, before[:, 0])


@SCOPES
def test_short_prompts_are_kept_whole_and_so_are_the_first_answers(allocator):
    for schedule in (growing(0.3, 40), Fixed(torch.full((LAYERS, HEADS), 40))):
        store = feed(store_of(allocator, schedule), prompts(3))
        decode(store, 37)
        assert store.lengths.unique().tolist() == [40]
        assert not store.report().evicted
        decode(store, 1)
        assert store.lengths.unique().tolist() == [40]


@SCOPES
def test_pending_tokens_do_not_compete(allocator):
    given = prompts(50)
    early = feed(store_of(allocator), [tuple(x[:, :, :44] for x in tokens) for tokens in given])
    store = store_of(allocator)
    for layer, (query, key, value) in enumerate(given):
        chunk = store.arrive(layer, key, value)
        store.attend_chunk(layer, query, chunk, Scoring())
        store.keep(layer, query, chunk, Scoring(), hold=6)
    assert kept(store) == kept(early)
    store.crop(6)
    assert snapshot(store) == snapshot(early)


@SCOPES
def test_protected_spans_do_not_compete_and_come_on_top(allocator):
    plain = feed(store_of(allocator), prompts(50))
    store = feed(store_of(allocator, protected=[(10, 14)]), prompts(50))
    assert int(store.lengths.sum()) == int(plain.lengths.sum()) + 4 * LAYERS * HEADS
    assert all(set(range(10, 14)) <= set(positions) for positions in kept(store).values())


@dataclass(frozen=True, slots=True)
class Recording(BudgetAllocator):
    """Even shares; remembers what it was given."""

    split_scope: ClassVar[str] = "model"
    given: ClassVar[list] = []

    def shares(self, importance, budget):
        return torch.ones(budget.shape)

    def split(self, scores, budget):
        self.given.append(([x.clone() for x in scores], budget))
        return torch.ones(1, len(scores), HEADS)


def test_what_an_allocator_is_given():
    Recording.given.clear()
    policy = ValueNorm(SINKS, recent_window=3)
    store = store_of(Recording(), policy=policy, batch_size=2, protected=[(5, 7)])
    given = prompts(50, batch=2)
    feed(store, given, num_padding=[0, 20])
    assert [len(scores) for scores, _ in Recording.given] == [1, 1, 2, 2, 3, 3], "each row by itself"
    (alone,), budget = Recording.given[1]
    assert alone.shape == (1, HEADS, 50) and budget.shape == (1, HEADS)
    assert bool((alone[0, :, :20] == -torch.inf).all()), "padding"
    assert bool((alone[0, :, 20 + 5 : 20 + 7] == -torch.inf).all()), "spans are on top"
    stays = [*range(20, 20 + SINKS), 47, 48, 49]
    assert bool((alone[0, :, stays] == torch.inf).all())
    free = [p for p in range(20, 47) if p not in (20, 21, 25, 26)]
    torch.testing.assert_close(alone[0][:, free], given[0][2][1, :, free].norm(dim=-1))
    assert budget.total == 10 * LAYERS * HEADS - FLOOR * HEADS * 2, "30 tokens: the least mean; two layers are to come"
    total = round(0.3 * 50 * LAYERS * HEADS)
    scores, budget = Recording.given[4]
    assert budget.total == total and int(budget.floors().min()) == FLOOR
    left = (total - FLOOR * HEADS) // 2
    assert [int((x > -torch.inf).sum()) for x in scores] == [left, left, HEADS * 48], "the kept ones, without spans"


@dataclass(frozen=True, slots=True)
class Swinging(Recording):
    """Wants the first layer back that it gave away."""

    def split(self, scores, budget):
        shares = torch.ones(1, len(scores), HEADS)
        shares[0, 0] = 9 if len(scores) == LAYERS else 0.1
        return shares


def test_what_an_earlier_layer_gave_away_is_gone():
    store, capacities = store_of(Swinging()), []
    for layer, tokens in enumerate(prompts(50)):
        store.prefill(layer, *tokens)
        capacities.append(store.capacities[:, 0])
    assert bool((capacities[2][:2] <= capacities[1][:2]).all())
    assert int(store.lengths.sum()) == int(store.capacities.sum()) == round(0.3 * 50 * LAYERS * HEADS)


@dataclass(frozen=True, slots=True)
class Broken(BudgetAllocator):
    split_scope: ClassVar[str] = "layer"
    how: str = "nan"

    def shares(self, importance, budget):
        return torch.ones(budget.shape)

    def split(self, scores, budget):
        return {"nan": scores[0].sum(-1, keepdim=True).view(1, 1, HEADS) * 0, "shape": torch.ones(1, HEADS)}[self.how]


def test_what_is_refused():
    said = r"Broken.split returned nan at \[0, 0, 0\], expected shares that are finite and >= 0; scores are inf"
    with pytest.raises(PluginError, match=said):
        feed(store_of(Broken()), prompts(50))
    said = r"Broken.split returned torch.float32 of shape \(1, 2\), expected numbers of shape \(1, 1, 2\)"
    with pytest.raises(PluginError, match=said):
        feed(store_of(Broken("shape")), prompts(50))
    with pytest.raises(BudgetError, match=r"ModelTopK splits the budget at run time .* tensor-parallel rank"):
        store_of(ModelTopK(), heads=(0, 1))

    class Static(_TopK):
        pass

    with pytest.raises(BudgetError, match="Static does not split at run time"):
        store_of(Static())


@SCOPES
@pytest.mark.parametrize("policy", [Recent(SINKS), Coarse(SINKS)], ids=str)
def test_other_policies_meet_the_total_too(allocator, policy):
    """The window rule, and scores with many ties."""
    store = feed(store_of(allocator, policy=policy), prompts(50))
    assert int(store.lengths.sum()) == round(0.3 * 50 * LAYERS * HEADS)
    decode(store, 70)
    if isinstance(policy, Recent):
        for positions in kept(store).values():
            count = len(positions)
            assert positions == [0, 1, *range(120 - count + 2, 120)]
