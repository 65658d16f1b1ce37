"""What a policy is handed, field by field."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from kvpolicy import DecodeStep, EvictionPolicy, PluginError, Rotary, registry
from kvpolicy.budget.ask import Ask
from kvpolicy.cache.schedule import Growing
from kvpolicy.cache.split import RuntimeSplit
from kvpolicy.cache.store import RaggedStore, Scoring
from kvpolicy.plugins.checks import class_problems
from kvpolicy.plugins.decode_step import in_blocks
from kvpolicy.testing.laws import tensors_of
from tests.cache.play import GROUP, TOLERANCE, store_of, tensors

ATTENTION = {"query_attention", "window_attention", "full_attention", "decode_attention"}
SOURCES = {"positions", "scores", "capacity", "keys", "values", "queries", "scale", *ATTENTION}


@dataclass(frozen=True, slots=True)
class Recording(EvictionPolicy):
    """Prefers small positions; remembers what it was given."""

    requires: ClassVar[frozenset[str]] = frozenset(SOURCES)
    new_entry_score: ClassVar[float] = 7.5
    prompts: ClassVar[list] = []
    steps: ClassVar[list] = []
    num_sink_tokens: int = 1
    observation_window: int = 4

    def score_prompt(self, activations):
        self.prompts.append(activations)
        return -activations.positions.float()

    def score_step(self, step):
        self.steps.append(step)
        return step.scores + 0.25


@pytest.fixture(autouse=True)
def forgotten():
    Recording.prompts.clear()
    Recording.steps.clear()


def parts(given, begin, end):
    return tuple(x[:, :, begin:end] for x in given)


def test_a_first_prompt():
    given = query, key, value = tensors(9)
    store_of(Recording(), [5, 6]).prefill(0, *given)
    (seen,) = Recording.prompts
    assert seen.layer == 0 and seen.positions.tolist() == [[list(range(9))] * 2]
    for got, expected in ((seen.queries, query), (seen.keys, key), (seen.values, value)):
        assert torch.equal(got, expected)
    assert seen.scale == query.shape[-1] ** -0.5
    without_a_model = {"positions", "capacity", "keys", "values", "queries", "scale", "scores"}
    assert seen.supplied().keys() == without_a_model | {
        "layer",
        "query_attention",
        "window_attention",
        "full_attention",
    }
    weights = causal_weights(query, key)
    torch.testing.assert_close(seen.full_attention, weights.sum((2, 3)), **TOLERANCE)
    torch.testing.assert_close(seen.window_attention, weights[:, :, :, -4:].sum((2, 3)), **TOLERANCE)
    torch.testing.assert_close(seen.query_attention, weights[:, :, :, -4:].sum(2), **TOLERANCE)
    assert torch.equal(seen.scores, torch.zeros(1, 2, 9)) and seen.scores.dtype == torch.float32


@dataclass(frozen=True, slots=True)
class Squaring(Recording):
    attention_power: float = 2.0


def test_a_power_of_attention():
    given, store = tensors(10), store_of(Squaring(), [12, 12])
    store.prefill(0, *parts(given, 0, 9))
    (seen,) = Recording.prompts
    squares = causal_weights(*given[:2]) ** 2
    torch.testing.assert_close(seen.full_attention, squares[..., :9, :9].sum((2, 3)), **TOLERANCE)
    torch.testing.assert_close(seen.window_attention, squares[..., 5:9, :9].sum((2, 3)), **TOLERANCE)
    store.decode(0, *parts(given, 9, 10))
    (step,) = Recording.steps
    attention = step.attention[step.positions >= 0]
    torch.testing.assert_close(attention, squares[..., 9, :].sum(2).flatten(), **TOLERANCE)


def causal_weights(query, key):
    """[B, H, group, n, n] in plain torch."""
    scores = query.unflatten(1, (-1, GROUP)) @ key[:, :, None].transpose(-1, -2) * query.shape[-1] ** -0.5
    return scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf).softmax(-1)


def test_a_later_chunk_covers_entries_and_chunk():
    given, store = tensors(14), store_of(Recording(), [5, 8])
    store.prefill(0, *parts(given, 0, 9))
    held = store.positions(0)
    store.prefill(0, *parts(given, 9, 14))
    seen = Recording.prompts[1]
    assert seen.positions.shape == (1, 2, 8 + 5)
    assert seen.positions[0, 0, :8].tolist() == [*held[0].tolist(), -1, -1, -1], "absent entries are -1"
    assert seen.positions[0, 1, :8].tolist() == held[1].tolist()
    assert seen.positions[0, :, 8:].tolist() == [list(range(9, 14))] * 2
    assert torch.equal(seen.queries, given[0][:, :, 9:])
    for head in range(2):
        present = seen.positions[0, head] >= 0
        for got, x in ((seen.keys, given[1]), (seen.values, given[2])):
            assert torch.equal(got[0, head][present], x[0, head, seen.positions[0, head][present]])
    assert seen.full_attention.sum(2).allclose(torch.tensor(5.0 * GROUP))
    assert seen.window_attention.sum(2).allclose(torch.tensor(4.0 * GROUP))
    assert seen.full_attention[0, 0, 5:8].tolist() == [0, 0, 0]
    assert seen.query_attention.sum(3).allclose(torch.tensor(1.0 * GROUP))
    torch.testing.assert_close(seen.query_attention.sum(2), seen.window_attention, **TOLERANCE)
    assert seen.query_attention[0, :, :, 8 + 1 :].triu(1).count_nonzero() == 0, "later tokens are not seen"


def test_a_later_chunk_brings_the_scores_so_far():
    given, store = tensors(14), store_of(Recording(), [5, 8])
    store.prefill(0, *parts(given, 0, 9))
    store.decode(0, *parts(given, 9, 10))
    store.prefill(0, *parts(given, 10, 14))
    seen = Recording.prompts[1]
    for head, held in ((0, 5), (1, 8)):
        # minus its position from the prompt, 7.5 for what was decoded, and a quarter more for the step
        expected = [7.75 if p == 9 else 0.25 - p for p in seen.positions[0, head, :held].tolist()]
        assert seen.scores[0, head, :held].tolist() == expected and 9 in seen.positions[0, head]
        assert seen.scores[0, head, held:].count_nonzero() == 0, "absent entries and the chunk are 0"


def test_the_attention_of_each_query_is_that_of_a_forward_of_its_own():
    given, store, alone = tensors(15), *(store_of(Recording(), [20, 20]) for _ in range(2))
    store.prefill(0, *parts(given, 0, 12))
    store.prefill(0, *parts(given, 12, 15))  # fewer queries than the window has
    assert Recording.prompts[0].query_attention.shape == (1, 2, 4, 12)
    assert Recording.prompts[1].query_attention.shape == (1, 2, 3, 15)
    for position in range(15):
        alone.prefill(0, *parts(given, position, position + 1))
    for which, last in ((0, 12), (1, 15)):
        each = Recording.prompts[which].query_attention
        for index in range(each.shape[2]):
            position = last - each.shape[2] + index
            own = Recording.prompts[2 + position].full_attention
            torch.testing.assert_close(each[:, :, index, : position + 1], own, **TOLERANCE)
            assert each[:, :, index, position + 1 :].count_nonzero() == 0


def test_padding_is_absent_and_asks_nothing():
    store = store_of(Recording(), [5, 8], batch_size=2)
    store.prefill(0, *tensors(9, batch=2), num_padding=[0, 6])
    (seen,) = Recording.prompts
    assert seen.positions[1].tolist() == [[-1] * 6 + [0, 1, 2]] * 2
    queries = torch.tensor([9.0, 3.0])[:, None].expand(-1, 2)
    torch.testing.assert_close(seen.full_attention.sum(2), queries * GROUP, **TOLERANCE)
    torch.testing.assert_close(seen.window_attention.sum(2), queries.clamp(max=4) * GROUP, **TOLERANCE)
    assert int(seen.full_attention[1, :, :6].count_nonzero()) == 0
    asking = torch.tensor([[1.0] * 4, [0.0, 1.0, 1.0, 1.0]])[:, None].expand(-1, 2, -1)
    torch.testing.assert_close(seen.query_attention.sum(3), asking * GROUP, **TOLERANCE)
    torch.testing.assert_close(seen.query_attention.sum(2), seen.window_attention, **TOLERANCE)


def test_pending_tokens_are_part_of_the_chunk():
    given, store = tensors(12), store_of(Recording(), [5, 8])
    for begin, end in ((0, 9), (9, 10), (10, 12)):
        query, key, value = parts(given, begin, end)
        store.keep(0, query, store.arrive(0, key, value), Scoring(), hold=2)
    last = Recording.prompts[-1]
    assert last.positions[0, 0, -4:].tolist() == [8, 9, 10, 11]
    assert last.queries.shape[2] == 2 and torch.equal(last.keys[0, :, -4:], given[1][0, :, 8:])
    assert last.full_attention.sum(2).allclose(torch.tensor(2.0 * GROUP))


def test_a_decoding_step():
    given, store = tensors(11), store_of(Recording(), [[9, 9], [5, 8]])
    for layer in range(2):
        store.prefill(layer, *parts(given, 0, 9))
    for begin in (9, 10):
        for layer in range(2):
            store.decode(layer, *parts(given, begin, begin + 1))
    _, first, _, second = Recording.steps
    assert first.layer == 1 and first.lengths.tolist() == [5, 8] and first.seen.tolist() == [10]
    assert second.lengths.tolist() == [5, 8] and second.num_kv_heads == 2 and second.max_positions == 4096
    assert second.segment.tolist() == [0] * 5 + [1] * 8
    held = torch.cat(store.positions(1))
    assert second.positions.tolist() == held.tolist()
    heads = torch.tensor([0] * 5 + [1] * 8)
    assert torch.equal(second.keys, given[1][0, heads, held])
    # what a prompt scored, 7.5 for what was decoded; and a quarter more for each step before
    assert sorted(first.scores.tolist()) == sorted([0, -1, -2, -3, 7.5, 0, -1, -2, -3, -4, -5, -6, 7.5])
    assert second.scores[second.positions == 9].tolist() == [7.75] * 2
    assert second.scores[second.positions == 10].tolist() == [7.5] * 2
    for head, part in ((0, slice(0, 5)), (1, slice(5, 13))):
        query = given[0][0, head * GROUP : head * GROUP + GROUP, 10]
        weights = (query @ second.keys[part].T * 8**-0.5).softmax(-1)
        torch.testing.assert_close(second.attention[part], weights.sum(0), **TOLERANCE)


def test_a_decoding_step_of_a_batch():
    store, given = store_of(Recording(), [4, 5, 6], batch_size=2), tensors(9, batch=2, heads=3)
    store.prefill(0, *parts(given, 0, 8), num_padding=[0, 3])
    store.decode(0, *parts(given, 8, 9))
    (step,) = Recording.steps
    assert step.num_kv_heads == 3 and step.lengths.tolist() == [4, 5, 6, 4, 5, 6]
    assert step.segment.tolist() == [s for s, n in enumerate((4, 5, 6, 4, 5, 6)) for _ in range(n)]
    newest = step.positions[(step.segment // step.num_kv_heads == 1)].max()
    assert int(newest) == 5 and step.seen.tolist() == [9, 6]


def test_free_rows_of_a_step_mean_nothing():
    """Segments that grow have rows to spare; they are zeroed once, and no score that is returned for them counts."""

    @dataclass(frozen=True, slots=True)
    class Spoiling(Recording):
        def score_step(self, step):
            self.steps.append(step)
            return (step.scores + 1).where(step.positions >= 0, torch.nan)

    given, store = tensors(12), store_of(Spoiling(), [5, 100])
    store.prefill(0, *parts(given, 0, 9))
    for begin in range(9, 12):
        store.decode(0, *parts(given, begin, begin + 1))
    *_, step = Recording.steps
    free = step.positions < 0
    assert step.lengths.tolist() == [5, 12] and int(free.sum()) == 9 + 64 - 12
    assert step.segment.tolist() == [0] * 5 + [1] * 73 and len(step.scores) == 78
    assert bool((step.scores[free] == -torch.inf).all()) and not step.attention[free].any()
    assert not step.keys[free].any() and not step.values[free].any()
    # a token of the prompt has minus its position and one for each step; it starts from 7.5 if it was decoded
    expected = [9.5 if p == 9 else 8.5 if p == 10 else 7.5 if p == 11 else 2.0 - p for p in step.positions.tolist()]
    assert step.scores[~free].tolist() == [x for x, f in zip(expected, free.tolist(), strict=True) if not f]


@pytest.mark.parametrize("shape", [(), (3,)])
def test_sums_and_maxima_of_a_step_leave_free_rows_out(shape):
    lengths, rows = torch.tensor([0, 3, 0, 17]), torch.tensor([2, 3, 0, 20])
    segment = torch.arange(4).repeat_interleave(rows)
    column = torch.arange(25) - (rows.cumsum(0) - rows)[segment]
    present = column < lengths[segment]
    step = DecodeStep(0, 2, segment, torch.zeros(25), column.where(present, -1).int(), lengths, lengths[::2], 64)
    x = torch.randn(25, *shape, generator=torch.Generator().manual_seed(0))
    x[~present] = torch.nan
    own = [x[present & (segment == index)] for index in range(4)]
    total = torch.stack([part.sum(0) for part in own])
    largest = torch.stack([part.amax(0) if len(part) else x.new_full(shape, -torch.inf) for part in own])
    torch.testing.assert_close(step.total(x), total)
    assert torch.equal(step.largest(x), largest)
    assert torch.equal(step.at_segment(largest), largest[segment])
    for how, free, expected in (("sum", 0.0, total), ("max", -torch.inf, largest)):  # as a GPU does it
        torch.testing.assert_close(in_blocks(x.where(step._present(x), free), segment, 4, how), expected)


def test_a_capacity_is_what_a_head_may_keep_behind_the_chunk():
    store = store_of(Recording(), [5, 8], batch_size=2, protected=[(2, 4)])
    store.prefill(0, *tensors(9, batch=2), num_padding=[0, 6])
    (seen,) = Recording.prompts
    assert seen.capacity.tolist() == [[5, 8]] * 2 and seen.capacity.dtype == torch.int64
    schedule = Growing((1, 2), lambda *_: torch.ones(1, 2), Ask(0.5, min_tokens=2), floor=2)
    growing = RaggedStore(store.spec, schedule, Recording())
    for begin, end in ((0, 8), (8, 20)):
        growing.prefill(0, *parts(tensors(20), begin, end))
    assert [seen.capacity.tolist() for seen in Recording.prompts[1:]] == [[[4, 4]], [[10, 10]]]


def test_a_capacity_is_refused_where_scores_split_the_budget():
    @dataclass(frozen=True, slots=True)
    class Half(Recording):
        requires: ClassVar[frozenset[str]] = frozenset({"capacity"})

    store = store_of(Recording(), [5, 8])
    split = RuntimeSplit(registry.create("allocator", "adakv"), store.schedule, 2)
    with pytest.raises(PluginError, match="policy Half requires capacity, and AdaKVAllocator splits the budget at run"):
        RaggedStore(store.spec, store.schedule, Half(), split=split)


def test_a_field_that_nobody_asked_for_is_not_there():
    @dataclass(frozen=True, slots=True)
    class Frugal(Recording):
        requires: ClassVar[frozenset[str]] = frozenset({"positions"})

    store = store_of(Frugal(), [5, 6])
    store.prefill(0, *tensors(9))
    store.decode(0, *tensors(1))
    assert Recording.prompts[0].supplied().keys() == {"layer", "positions"}
    assert not Recording.steps[0].supplied().keys() & {"keys", "values", "attention"}


def test_a_policy_without_score_step_is_not_asked():
    @dataclass(frozen=True, slots=True)
    class Quiet(Recording):
        score_step = EvictionPolicy.score_step

    store = store_of(Quiet(), [5, 6])
    store.prefill(0, *tensors(9))
    store.decode(0, *tensors(1))
    assert not Recording.steps


def test_a_policy_that_writes_into_a_step_changes_no_entry():
    @dataclass(frozen=True, slots=True)
    class Careless(Recording):
        def score_step(self, step):
            step.keys.zero_()
            step.positions.zero_()
            return step.scores

    store, given = store_of(Careless(), [5, 6]), tensors(9)
    store.prefill(0, *given)
    store.decode(0, *tensors(1, seed=1))
    assert [sorted(p.tolist()) for p in store.positions(0)] == [[0, 1, 2, 3, 9], [0, 1, 2, 3, 4, 9]]
    assert int((store.layers[0].arena.keys == 0).all(1).sum()) == 0


@dataclass(frozen=True, slots=True)
class Needy(EvictionPolicy):
    requires: ClassVar[frozenset[str]] = frozenset({"hidden_before", "positions"})
    num_sink_tokens: int = 1

    def score_prompt(self, activations):
        return activations.hidden_before[:, None, :, 0].expand(-1, 2, -1).contiguous()


def test_sources_that_the_caller_supplies():
    with pytest.raises(PluginError, match="Needy requires hidden_before, which this cache cannot supply"):
        store_of(Needy(), [3, 3])
    store = store_of(Needy(), [3, 3], supplied=frozenset({"hidden_before", "rope"}))
    query, key, value = tensors(6)
    hidden = torch.tensor([0.0, 5, 1, 4, 2, 3]).view(1, 6, 1)
    store.keep(0, query, store.arrive(0, key, value), Scoring(), extra={"hidden_before": hidden, "rope": None})
    assert [sorted(p.tolist()) for p in store.positions(0)] == [[0, 1, 3]] * 2
    with pytest.raises(PluginError, match=r"Needy requires hidden_before: give it as extra="):
        store.keep(0, query, store.arrive(0, key, value), Scoring())


@dataclass(frozen=True, slots=True)
class Destroying(EvictionPolicy):
    """Keeps the most recent, and zeroes whatever it was given."""

    requires: ClassVar[frozenset[str]] = frozenset(
        {"positions", "keys", "values", "queries", "hidden_before", "rope", "rotary", "output_weight"}
    )
    num_sink_tokens: int = 1

    def score_prompt(self, activations):
        scores = activations.positions.float()
        for _, tensor in tensors_of(activations):
            tensor.zero_()
        return scores


@pytest.mark.parametrize("chunks", [[9], [5, 4]])
def test_a_policy_that_writes_into_a_prompt_changes_nothing(chunks):
    extra = {
        "hidden_before": torch.ones(1, 9, 4),
        "rope": (torch.ones(1, 9, 8), torch.ones(1, 9, 8)),
        "rotary": Rotary(torch.arange(4), torch.arange(4) + 4, torch.ones(4)),
        "output_weight": torch.ones(4, 36),
    }
    given = tensors(9)
    before = copy.deepcopy((given, extra))
    store = store_of(Destroying(), [5, 5], supplied=frozenset(extra))
    begin = 0
    for length in chunks:
        query, key, value = (tensor[:, :, begin : begin + length] for tensor in given)
        store.keep(0, query, store.arrive(0, key, value), Scoring(), extra=extra)
        begin += length
    assert all(map(torch.equal, given, before[0]))
    for (_, now), (_, then) in zip(tensors_of(_Extra(**extra)), tensors_of(_Extra(**before[1])), strict=True):
        assert torch.equal(now, then)
    arena = store.layers[0].arena
    for head, (start, positions) in enumerate(zip(arena.start.tolist(), store.positions(0), strict=True)):
        assert sorted(positions.tolist()) == [0, 5, 6, 7, 8]
        held = slice(start, start + 5)
        assert torch.equal(arena.keys[held], given[1][0, head][positions])
        assert torch.equal(arena.values[held], given[2][0, head][positions])


@dataclass
class _Extra:
    hidden_before: object
    rope: object
    rotary: object
    output_weight: object


@dataclass(frozen=True, slots=True)
class Wrapping(EvictionPolicy):
    """What it says of itself depends on what it wraps."""

    inner: str = "snapkv"
    num_sink_tokens: int = 1

    @property
    def wrapped(self):
        return registry.create("policy", self.inner, {"num_sink_tokens": self.num_sink_tokens})

    @property
    def requires(self):
        return self.wrapped.requires

    @property
    def recent_window(self):
        return self.wrapped.recent_window

    def score_prompt(self, activations):
        return self.wrapped.score_prompt(activations)


@pytest.mark.parametrize("inner", ["keydiff", "expected_attention"])
def test_a_policy_may_wrap_another(inner):
    assert class_problems("policy", Wrapping) == []
    policies = Wrapping(inner), Wrapping(inner).wrapped
    stores = [store_of(policy, [5, 6], supplied=frozenset({"rotary"})) for policy in policies]
    for store in stores:
        query, key, value = tensors(20)
        extra = {"rotary": Rotary(torch.arange(4), torch.arange(4) + 4, torch.ones(4))}
        store.keep(0, query, store.arrive(0, key, value), Scoring(), extra=extra)
    ours, theirs = ([sorted(p.tolist()) for p in store.positions(0)] for store in stores)
    assert ours == theirs and len(ours[0]) == 5
