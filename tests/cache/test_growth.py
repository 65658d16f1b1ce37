"""Budgets that grow with the tokens seen."""

import pytest
import torch

from kvpolicy import BudgetError, BudgetPlan, PlanError, registry
from kvpolicy.budget.ask import Ask
from kvpolicy.budget.plan import PlanChoice, PlanLevel, PlanMethod, PlanModel
from kvpolicy.cache import RaggedStore
from kvpolicy.cache import schedule as schedules
from kvpolicy.cache.schedule import UNLIMITED, Fixed, Growing
from tests.cache.play import Play, room, spec_of, tensors
from tests.cache.policies import Coarse, Recent, ValueNorm

SHARES = torch.tensor([[0.1, 0.5], [0.4, 0.2]], dtype=torch.float64)


def plan_of(*levels, policy=None):
    """A plan of levels whose shares are multiples of `SHARES`."""
    parts = tuple(PlanLevel(level, SHARES * (level / float(SHARES.mean()))) for level in levels)
    method = PlanMethod(None, None, policy or PlanChoice("streaming", {"num_sink_tokens": 4}))
    return BudgetPlan(PlanModel.from_spec(spec_of(2)), method, None, parts)


def decode(store, count, given=None):
    """Feeds `count` equal tokens, to every layer; yields after each."""
    _, key, value = given or tensors(1, store.batch_size)
    for _ in range(count):
        for layer in range(2):
            store.append(layer, key, value)
        yield store


def prompt(store, length):
    for layer in range(2):
        store.prefill(layer, *tensors(length, store.batch_size))


PLANS = {
    "a table": lambda: BudgetPlan.from_capacities(spec_of(2), [[100, 500], [400, 200]], context_length=1000),
    "several levels": lambda: plan_of(0.1, 0.3, 0.5),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_a_short_prompt_and_a_long_answer(plan):
    plan = plan()
    store = RaggedStore(spec_of(2), schedules.from_plan(plan, Ask(retention=0.3)), Recent(4))
    prompt(store, 16)
    held, capacities = store.lengths, store.capacities
    assert bool((held == 16).all()) and int(capacities.sum()) == 4 * 128
    for step, _ in enumerate(decode(store, 1500)):
        seen, before, capacities = 17 + step, capacities, store.capacities
        assert bool((capacities >= before).all()), "a capacity never falls"
        assert bool((store.lengths <= capacities).all())
        if seen <= 128:
            assert bool((store.lengths == seen).all()), "short contexts are kept whole"
        if (step + 1) % 64 == 0:
            assert int(capacities.sum()) == max(round(0.3 * seen * 4), 4 * 128)
        else:
            assert torch.equal(capacities, before)
        if step % 100 == 0:
            for layer in store.layers:
                most = torch.maximum(room(layer.arena.length), layer.capacity)
                assert bool((layer.arena.allocated <= most).all())
    assert 0.29 <= store.report().retention <= 0.31
    assert torch.equal(store.capacities[:, 0], plan.capacities(16 + 64 * 23, 0.3)), "the plan's shares in the end"


def test_a_long_prompt_gets_the_shares_of_its_retention():
    plan = plan_of(0.1, 0.3, 0.5)
    for retention in (0.1, 0.2, 0.3, 0.45):
        store = RaggedStore(spec_of(2), schedules.from_plan(plan, Ask(retention=retention)), Recent(4))
        prompt(store, 2000)
        assert torch.equal(store.capacities[:, 0], plan.capacities(2000, retention))
        assert torch.equal(store.lengths, store.capacities)
        assert not store.report().floors_exceed


def test_chunks_keep_what_is_allowed_after_each():
    schedule = schedules.from_plan(plan_of(0.3), Ask(min_tokens=8))
    store = RaggedStore(spec_of(2), schedule, Recent(4))
    for seen in range(50, 401, 50):
        prompt(store, 50)
        assert int(store.capacities.sum()) == round(0.3 * seen * 4)
        assert torch.equal(store.lengths, store.capacities)


@pytest.mark.parametrize("policy", [Recent(), ValueNorm(recent_window=3), Coarse()], ids=str)
def test_growth_follows_the_oracle(policy):
    """Kept tokens too: what was evicted does not come back when a capacity grows."""
    schedule = Growing((1, 2), lambda kept, context: torch.tensor([[1.0, 3.0]]), Ask(0.3, min_tokens=10), 3)
    play = Play(policy, schedule, batch=2, tokens=240).prompt(30, 14).decode(70).prompt(40, 3).decode(60)
    assert play.store.capacities.sum(2).tolist() == [[round(0.3 * 140 * 2), round(0.3 * 87 * 2)]]
    assert play.store.capacities[0, 0, 1] > 2 * play.store.capacities[0, 0, 0]


def test_rows_grow_by_their_own_lengths():
    schedule = schedules.from_plan(plan_of(0.3), Ask(min_tokens=20))
    store = RaggedStore(spec_of(2), schedule, Recent(4), batch_size=3)
    given = tensors(300, 3)
    for layer in range(2):
        store.prefill(layer, *given, num_padding=[0, 200, 290])
    rows = store.rows
    for _ in decode(store, 64):
        pass
    for row, seen in enumerate((364, 164, 74)):
        alone = RaggedStore(spec_of(2), schedule, Recent(4))
        prompt(alone, seen - 64)
        for _ in decode(alone, 64):
            pass
        assert torch.equal(store.capacities[:, row], alone.capacities[:, 0])
        assert torch.equal(store.lengths[:, row], alone.lengths[:, 0])
        assert int(store.capacities[:, row].sum()) == max(round(0.3 * seen * 4), 80)
    assert rows is store.rows


def test_decode_append_grows_and_the_next_prompt_evicts():
    schedule = schedules.from_plan(plan_of(0.3), Ask(min_tokens=8))
    store = RaggedStore(spec_of(2), schedule, Recent(4), decode="append")
    prompt(store, 200)
    for _ in decode(store, 100):
        pass
    assert torch.equal(store.lengths[:, 0], plan_of(0.3).capacities(200, 0.3) + 100)
    assert int(store.capacities.sum()) == round(0.3 * 264 * 4)
    arenas = [layer.arena for layer in store.layers]
    assert all(bool((a.allocated <= room(a.length)).all()) for a in arenas), "slack under no limit too"
    prompt(store, 20)
    assert int(store.lengths.sum()) == round(0.3 * 320 * 4)


def test_growing_moves_the_entries_once_in_64_tokens():
    store = RaggedStore(spec_of(2), schedules.from_plan(plan_of(0.3), Ask()), Recent(4))
    prompt(store, 16)
    arenas = [store.layers[0].arena.keys for _ in decode(store, 112)]
    assert len({id(arena) for arena in arenas}) <= 112 // 64 + 1
    before, arenas = store.report().moves, []
    for _ in decode(store, 640):
        if not arenas or arenas[-1] is not store.layers[0].arena.keys:
            arenas.append(store.layers[0].arena.keys)
    assert 1 < len(arenas) <= 640 // 64 + 1
    assert store.report().moves == before + len(arenas) - 1


def test_fixed_capacities_move_entries_until_they_are_full():
    store = RaggedStore(spec_of(2), Fixed(torch.full((2, 2), 120)), Recent(4))
    assert store.report().moves == 0
    prompt(store, 100)
    moves = [store.report().moves for _ in decode(store, 300)]
    assert moves == [moves[0]] * 300 and moves[0] <= 2


def test_retention_1_evicts_nothing_and_scores_nothing():
    schedule = schedules.from_plan(plan_of(0.3), Ask(retention=1.0))
    store = RaggedStore(spec_of(2), schedule, ValueNorm(), protected=[(0, 3)])
    prompt(store, 200)
    for _ in decode(store, 40):
        pass
    assert store.lengths.unique().tolist() == [240]
    assert store.capacities.unique().tolist() == [UNLIMITED]
    assert store.layers[0].arena.scores is None
    assert all(bool((a.allocated <= room(a.length)).all()) for a in (layer.arena for layer in store.layers))


@pytest.mark.parametrize("options", [{"retention": 0.3, "context_length": 512}, {"tokens": 100, "context_length": 512}])
def test_capacities_fixed_up_front(options):
    plan = plan_of(0.1, 0.3)
    store = RaggedStore.from_plan(plan, spec=spec_of(2), **options)
    prompt(store, 16)
    expected = plan.capacities(512, options.get("retention"), options.get("tokens"))
    assert torch.equal(store.capacities[:, 0], expected)
    for _ in decode(store, 300):
        pass
    assert torch.equal(store.capacities[:, 0], expected)
    assert torch.equal(store.lengths[:, 0], expected.clamp(max=316))


def test_from_plan_takes_the_plans_policy_device_and_dtype():
    plan = BudgetPlan.from_capacities(spec_of(2), [[10, 50], [40, 20]], context_length=100)
    plan = BudgetPlan(plan.model, plan.method, None, plan.levels, {"context_length": 100})
    store = RaggedStore.from_plan(plan, batch_size=2, dtype=torch.bfloat16, protected=[(0, 9)], decode="append")
    assert store.policy == registry.create("policy", "streaming", {"num_sink_tokens": 4})
    assert {held.arena.keys.dtype for held in store.layers} == {torch.bfloat16}
    assert (store.decode_mode, store.batch_size, store.protection.spans) == ("append", 2, ((0, 9),))
    assert store.nbytes < 2000 and store.lengths.sum() == 0
    store = RaggedStore.from_plan(plan, tokens=30)
    assert int(store.schedule.at(1, None).sum()) == 120, "of the context that the plan was made on"


def test_a_growing_budget_keeps_room_for_one_more_than_the_sink_tokens():
    growing = Growing((1, 2), lambda kept, context: torch.tensor([[0.0, 1.0]]), Ask(0.1, min_tokens=1), 1)
    play = Play(ValueNorm(6), growing).prompt(3).decode(12)
    assert play.store.capacities.tolist() == [[[7, 7]]]
    assert play.store.report().floors_exceed


def test_what_a_schedule_refuses():
    with pytest.raises(PlanError, match=r"retention 0.05 is below the plan's lowest level"):
        schedules.from_plan(plan_of(0.1, 0.3), Ask(retention=0.05))
    with pytest.raises(PlanError, match=r"several levels \(0.1, 0.3\)"):
        schedules.from_plan(plan_of(0.1, 0.3), Ask())
    with pytest.raises(BudgetError, match="tokens=64 needs context_length= besides"):
        schedules.from_plan(plan_of(0.1, 0.3), Ask(tokens=64))
    with pytest.raises(BudgetError, match=r"both retention=0.3 and tokens=64"):
        schedules.from_plan(plan_of(0.3), Ask(tokens=64, retention=0.3, context_length=512))
    with pytest.raises(BudgetError, match="min_tokens is 0"):
        schedules.from_plan(plan_of(0.3), Ask(min_tokens=0))
    with pytest.raises(BudgetError, match="4 entries to layer 0, KV head 1, expected at least 5"):
        Fixed(torch.tensor([[9, 4]])).with_floor(5)


def test_an_allocator_without_importance_makes_a_schedule():
    uniform = registry.create("allocator", "uniform", {})
    schedule = schedules.from_allocator(uniform, Recent(4), spec_of(2), Ask(retention=0.3))
    assert schedule.at(1000, None).tolist() == [[300, 300], [300, 300]]
    fixed = schedules.from_allocator(uniform, Recent(4), spec_of(2), Ask(retention=0.3, context_length=10))
    assert fixed.at(1, None).tolist() == [[5, 5], [5, 5]] and fixed.total(1) == 12
    assert not schedules.from_allocator(uniform, Recent(4), spec_of(2), Ask(retention=1)).evicts
    with pytest.raises(BudgetError, match=r"retention is 1.2"):
        schedules.from_allocator(uniform, Recent(4), spec_of(2), Ask(retention=1.2))


def test_ranks_get_the_same_total():
    schedule = schedules.from_plan(plan_of(0.3), Ask(), tp_size=2)
    for seen in (64, 500, 501, 2000):
        table = schedule.at(seen, None)
        assert abs(int(table[:, 0].sum() - table[:, 1].sum())) <= 1
        assert int(table.sum()) == max(round(0.3 * seen * 4), 512)
    stores = [RaggedStore(spec_of(2), schedule, Recent(4), heads=(first, 1)) for first in range(2)]
    given = tensors(500)
    for first, store in enumerate(stores):
        query, key, value = given
        part = (query[:, 3 * first : 3 * first + 3], key[:, first : first + 1], value[:, first : first + 1])
        for layer in range(2):
            store.prefill(layer, *part)
        tensors_held = [x for layer in store.layers for x in layer.tensors.values()]
        assert all(x.untyped_storage().nbytes() == x.nbytes for x in tensors_held), "a part, not a view of the whole"
    held = torch.cat([store.lengths for store in stores], 2)
    assert torch.equal(held[:, 0], schedule.at(500, None))
