"""One rule leads from what is asked to the entries of each KV head: the formulas below say it on their own."""

import ast
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvpolicy
from kvpolicy import Budget, BudgetError, BudgetPlan, ModelSpec, PlanError, apportion, registry
from kvpolicy.budget.ask import Ask
from kvpolicy.budget.entries import capacities, context_budget, rank_groups, unmeasured_capacities
from kvpolicy.budget.plan import PlanChoice, PlanLevel, PlanMethod, PlanModel, kept_fractions
from kvpolicy.cache import schedule as schedules
from kvpolicy.cache.schedule import UNLIMITED
from kvpolicy.comparison.methods import Method
from kvpolicy.model.layer_spec import LayerSpec
from kvpolicy.tuning.sizes import level_table

SHAPE = LAYERS, HEADS = 3, 4
KV_HEADS = LAYERS * HEADS
SPEC = ModelSpec("mine", 32, 97, 4096, "", (LayerSpec("full", HEADS, HEADS, 8, 8),) * LAYERS)
CORE = Path(kvpolicy.__file__).parent
FILES = sorted(CORE.rglob("*.py"))


# --- the rule, said a second time


def total_of(retention, context):
    return round(retention * context * LAYERS * HEADS)


def ranks(tp_size):
    if tp_size == 1:
        return None
    return torch.tensor([[head * tp_size // HEADS for head in range(HEADS)]] * LAYERS)


def table_of(shares, total, context, sinks, groups=None):
    """A KV head keeps the sink tokens and one more, or the context, whichever is less; none keeps more than that."""
    return apportion(shares, Budget(total, SHAPE, min(sinks + 1, context), context, groups=groups))


def between(levels, kept):
    """The shares at a retention between two levels; everything is kept at 1."""
    known = sorted([*levels.items(), (1.0, torch.ones(SHAPE, dtype=torch.float64))], key=lambda level: level[0])
    low, below = [level for level in known if level[0] <= kept][-1]
    high, above = next((level for level in known if level[0] > kept), (low, below))
    weight = 0.0 if high == low else (kept - low) / (high - low)
    return below + weight * (above - below)


def grown(levels, retention, seen, sinks, min_tokens, groups, held):
    """A budget that grows: a fraction of the tokens seen, `min_tokens` at least; no capacity falls."""
    total = max(total_of(retention, seen), min_tokens * KV_HEADS)
    context = max(seen, min_tokens, sinks + 1)
    floor = sinks + 1 if held is None else held
    shares = between(levels, max(retention, min(1.0, min_tokens / context)))
    return apportion(shares, Budget(total, SHAPE, floor, context, groups=groups))


# --- what is asked, and of whom


@dataclass
class Case:
    levels: dict
    sinks: int
    tp_size: int

    @property
    def plan(self):
        parts = tuple(PlanLevel(retention, shares) for retention, shares in self.levels.items())
        method = PlanMethod(None, None, PlanChoice("streaming", {"num_sink_tokens": self.sinks}))
        return BudgetPlan(PlanModel.from_spec(SPEC), method, None, parts)

    @property
    def lowest(self):
        return min(self.levels)


@st.composite
def tables(draw):
    """Proportions `[L, H]`, some of them zero, some far above others."""
    share = st.one_of(st.just(0.0), st.floats(1e-3, 1.0), st.floats(1.0, 1e3))
    flat = draw(st.lists(share, min_size=KV_HEADS, max_size=KV_HEADS).filter(any))
    return torch.tensor(flat, dtype=torch.float64).view(SHAPE)


@st.composite
def cases(draw):
    retentions = draw(st.lists(st.sampled_from([0.05, 0.1, 0.3, 0.5, 0.9]), min_size=1, max_size=3, unique=True))
    levels = {retention: kept_fractions(draw(tables()), retention) for retention in retentions}
    return Case(levels, draw(st.integers(0, 40)), draw(st.sampled_from([1, 2, 4])))


allocators = st.sampled_from(["uniform", "pyramid"])
contexts = st.one_of(st.integers(1, 200), st.integers(200, 20_000))


def policy_of(sinks):
    return registry.create("policy", "streaming", {"num_sink_tokens": sinks})


@settings(max_examples=100, deadline=None)
@given(cases(), contexts, st.data())
def test_a_plan_by_retention(case, context, data):
    retention = data.draw(st.one_of(st.just(case.lowest), st.floats(case.lowest, 1.0)))
    expected = table_of(
        between(case.levels, retention), total_of(retention, context), context, case.sinks, ranks(case.tp_size)
    )
    assert torch.equal(case.plan.capacities(context, retention, tp_size=case.tp_size), expected)
    fixed = schedules.from_plan(case.plan, Ask(retention, context_length=context), case.tp_size)
    if retention < 1:
        assert torch.equal(fixed.at(1, None), expected)
        assert fixed.total(1) == total_of(retention, context), "what was asked, without what the floors add"


@pytest.mark.filterwarnings("ignore:.*below the plan's lowest level")
@settings(max_examples=100, deadline=None)
@given(cases(), contexts, st.integers(1, 3000))
def test_a_plan_by_tokens(case, context, tokens):
    kept = min(tokens, context)
    shares = between(case.levels, max(kept / context, case.lowest))
    expected = table_of(shares, kept * KV_HEADS, context, case.sinks, ranks(case.tp_size))
    assert torch.equal(case.plan.capacities(context, tokens=tokens, tp_size=case.tp_size), expected)
    fixed = schedules.from_plan(case.plan, Ask(tokens=tokens, context_length=context), case.tp_size)
    assert torch.equal(fixed.at(1, None), expected) and fixed.total(1) == kept * KV_HEADS


@settings(max_examples=100, deadline=None)
@given(cases(), st.lists(st.integers(1, 3000), min_size=1, max_size=5), st.integers(1, 300), st.data())
def test_a_plan_that_grows(case, counts, min_tokens, data):
    retention = data.draw(st.one_of(st.just(case.lowest), st.floats(case.lowest, 0.99)))
    schedule = schedules.from_plan(case.plan, Ask(retention, min_tokens=min_tokens), case.tp_size)
    held = expected = None
    for seen in sorted(counts):
        held = schedule.at(seen, held)
        expected = grown(case.levels, retention, seen, case.sinks, min_tokens, ranks(case.tp_size), expected)
        assert torch.equal(held, expected)
        assert schedule.total(seen) == max(total_of(retention, seen), min_tokens * KV_HEADS)


@settings(max_examples=100, deadline=None)
@given(cases(), contexts, st.data())
def test_what_has_grown_is_what_the_plan_says(case, context, data):
    """The first table behind a prompt, once the prompt is long enough not to be kept whole."""
    retention = data.draw(st.floats(case.lowest, 0.99))
    schedule = schedules.from_plan(case.plan, Ask(retention, min_tokens=1), case.tp_size)
    if context > case.sinks and retention * context >= 1:
        expected = case.plan.capacities(context, retention, tp_size=case.tp_size)
        assert torch.equal(schedule.at(context, None), expected)


@settings(max_examples=100, deadline=None)
@given(allocators, st.floats(0.01, 0.99), contexts, st.integers(0, 40), st.integers(1, 300))
def test_an_allocator_that_measured_nothing(name, retention, context, sinks, min_tokens):
    allocator, policy, total = registry.create("allocator", name), policy_of(sinks), total_of(retention, context)
    importance = kvpolicy.Importance(torch.ones(SHAPE), torch.ones(LAYERS))
    budget = Budget(total, SHAPE, min(sinks + 1, context), context)
    expected = apportion(allocator.shares(importance, budget), budget)
    fixed = schedules.from_allocator(allocator, policy, SPEC, Ask(retention, context_length=context))
    assert torch.equal(fixed.at(1, None), expected) and fixed.total(1) == total
    compared = Method("", "streaming", policy, name, allocator)
    assert torch.equal(compared.table(SPEC, context, retention, 0, torch.float32), expected)
    growing = schedules.from_allocator(allocator, policy, SPEC, Ask(retention, min_tokens=min_tokens))
    total, most = max(total, min_tokens * KV_HEADS), max(context, min_tokens, sinks + 1)
    budget = Budget(total, SHAPE, sinks + 1, most)
    assert torch.equal(growing.at(context, None), apportion(allocator.shares(importance, budget), budget))


@settings(max_examples=100, deadline=None)
@given(tables(), st.floats(0.01, 1.0), contexts, st.integers(0, 40))
def test_uniform_is_ones(shares, retention, context, sinks):
    """What `eval uniform` says: the floors raise the total."""
    floor = min(sinks + 1, context)
    total = max(total_of(retention, context), floor * KV_HEADS)
    expected = apportion(torch.ones(SHAPE), Budget(total, SHAPE, floor, context))
    budget = context_budget(total_of(retention, context), SHAPE, context, sinks + 1)
    assert (budget.total, budget.floor, budget.ceiling) == (total, floor, context)
    assert torch.equal(unmeasured_capacities(registry.create("allocator", "uniform"), budget), expected)


@settings(max_examples=100, deadline=None)
@given(tables(), st.floats(0.01, 1.0), contexts, st.integers(0, 40))
def test_a_search_measures_the_table_that_its_plan_gives(shares, retention, context, sinks):
    probe = SimpleNamespace(spec=SPEC, least_capacity=sinks + 1)
    table, fractions = level_table(probe, shares, retention, context), kept_fractions(shares, retention)
    assert torch.equal(table, Case({retention: fractions}, sinks, 1).plan.capacities(context, retention))
    assert torch.equal(table, table_of(fractions, total_of(retention, context), context, sinks))


@settings(max_examples=100, deadline=None)
@given(tables(), contexts, st.data())
def test_entries_of_a_total(shares, context, data):
    """As `compare` asks, which gives fewer entries where each takes more bytes."""
    total, sinks = data.draw(st.integers(0, context * KV_HEADS)), data.draw(st.integers(0, 40))
    assert torch.equal(capacities(shares, total, context, sinks + 1), table_of(shares, total, context, sinks))


def test_everything_is_kept_at_one():
    allocator, policy = registry.create("allocator", "uniform"), policy_of(4)
    for schedule in (
        schedules.from_allocator(allocator, policy, SPEC, Ask(1.0)),
        schedules.from_allocator(allocator, policy, SPEC, Ask(1.0, context_length=50)),
        schedules.from_plan(Case({0.3: torch.full(SHAPE, 0.3)}, 4, 1).plan, Ask(1.0, context_length=50)),
    ):
        assert not schedule.evicts and bool((schedule.at(50, None) == UNLIMITED).all())


# --- what is asked is checked once


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"retention": 0.3, "tokens": 9}, "both retention=0.3 and tokens=9 were given; give one"),
        ({"tokens": 0}, "tokens is 0, expected a whole number of at least 1"),
        ({"tokens": 1.5}, "tokens is 1.5"),
        ({"context_length": 0}, "context_length is 0"),
        ({"min_tokens": True}, "min_tokens is True"),
        ({"min_tokens": None}, "min_tokens is null"),
    ],
)
def test_what_nobody_can_ask(arguments, message):
    with pytest.raises(BudgetError, match=message):
        Ask(**arguments)


def test_whole_numbers_of_other_libraries_become_ints():
    ask = Ask(tokens=torch.tensor(9), context_length=torch.tensor(90))
    assert (type(ask.tokens), type(ask.context_length)) == (int, int)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (Ask(), "without a plan a cache needs retention=, the kept fraction of the tokens seen"),
        (Ask(tokens=9), "without a plan a cache needs retention="),
        (Ask(1.2), r"retention is 1.2, expected above 0 and at most 1"),
        (Ask(float("nan")), "retention is nan"),
    ],
)
def test_what_no_allocator_can_give(ask, message):
    with pytest.raises(BudgetError, match=message):
        schedules.from_allocator(registry.create("allocator", "uniform"), policy_of(4), SPEC, ask)


def test_what_a_plan_completes():
    plan = Case({0.3: torch.full(SHAPE, 0.3)}, 4, 1).plan
    assert plan.completed(Ask()) == Ask(0.3)
    assert plan.completed(Ask(0.5)) == Ask(0.5)
    with pytest.raises(BudgetError, match="tokens=9 needs context_length= besides"):
        plan.completed(Ask(tokens=9))
    with pytest.raises(PlanError, match="several levels"):
        Case({0.3: torch.full(SHAPE, 0.3), 0.5: torch.full(SHAPE, 0.5)}, 4, 1).plan.completed(Ask())


def test_ranks_are_runs_of_heads():
    assert rank_groups(*SHAPE, 1) is None
    for tp_size in (2, 4):
        assert torch.equal(rank_groups(*SHAPE, tp_size), ranks(tp_size))


# --- and stands once


def sink_sums(source):
    """Where one is added to a number of sink tokens outside of a property that is named for it."""
    tree = ast.parse(source)
    owners = [x for x in ast.walk(tree) if isinstance(x, ast.FunctionDef) and x.name == "least_capacity"]
    owned = {node for owner in owners for node in ast.walk(owner)}
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) and node not in owned
        if "num_sink_tokens" in ast.unparse(node.left) and ast.unparse(node.right) == "1"
    ]


def test_who_needs_the_least_capacity_asks_for_it():
    lines = {path.relative_to(CORE).as_posix(): sink_sums(path.read_text(encoding="utf-8")) for path in FILES}
    assert {path: found for path, found in lines.items() if found} == {}
    assert sink_sums("floor = min(self.policy.num_sink_tokens + 1, context)") == [1]
    assert sink_sums("def least_capacity(self):\n    return self.num_sink_tokens + 1") == []
