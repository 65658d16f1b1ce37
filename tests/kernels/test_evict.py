import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kvpolicy_kernels.evict import evict, evict_into, rank

from kvpolicy.cache.select import ABSENT, Protection, ranking

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(not (INTERPRET or DEVICE == "cuda"), reason="needs a GPU or TRITON_INTERPRET=1")
backends = pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
SCORES = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 3e38, -3e38, float("inf"), float("-inf")]
INF, NAN = float("inf"), float("nan")


def table(*numbers):
    return torch.tensor(numbers, dtype=torch.int64, device=DEVICE)


class Arena:
    """Entries in segments with free rows between them, which hold garbage: NaN, and positions that would go first."""

    def __init__(self, entries, gap=3, dtype=torch.int32):
        """entries: (scores, positions) of each segment"""
        scores, positions, starts = [NAN] * gap, [-7] * gap, []
        for score, position in entries:
            starts.append(len(scores))
            scores += [*score, *[NAN, -INF, -NAN][:gap]]
            positions += [*position, *[0, -1, -(2**31)][:gap]]
        self.scores = torch.tensor(scores, device=DEVICE)
        self.positions = torch.tensor(positions, dtype=dtype, device=DEVICE)
        self.starts, self.lengths = table(*starts), table(*(len(position) for _, position in entries))

    def evict(self, seen, backend, *, scored=True, **options):
        scores = self.scores if scored else None
        slots = evict(scores, self.positions, self.starts, self.lengths, seen, backend=backend, **options)
        assert (slots.dtype, slots.shape, slots.device.type) == (torch.int64, self.starts.shape, DEVICE)
        return slots.tolist()


def by_definition(entries, seen, protection, scored=True):
    """The column of the least key, segment by segment."""
    slots = []
    for (score, position), tokens in zip(entries, seen, strict=True):
        place = torch.tensor([position], dtype=torch.int64)
        keys = ranking(torch.tensor([score]) if scored else None, place, torch.tensor([[tokens]]), protection)[0]
        present = [column for column, key in enumerate(keys.tolist()) if key != ABSENT]
        slots.append(min(present, key=keys.tolist().__getitem__, default=-1))
    return slots


# scores and positions of a segment after 20 tokens, with two sink tokens, a window of three and a span [5, 7)
CASES = {
    "the lowest score": (([2, 1, 3], [8, 9, 10]), 1),
    "the older of equals": (([1, 1, 1], [10, 8, 9]), 1),
    "minus zero is zero": (([0.0, -0.0], [8, 9]), 0),
    "zero is minus zero": (([-0.0, 0.0], [9, 8]), 1),
    "minus infinity": (([-3e38, -INF, -3e38], [8, 9, 10]), 1),
    "infinity is a score": (([INF, INF], [9, 8]), 1),
    "infinity goes before the window": (([INF, -INF], [8, 17]), 0),
    "the window by age": (([1, -INF, 7], [18, 19, 17]), 2),
    "the window goes before the pinned": (([9, 1, 1], [19, 0, 5]), 0),
    "the first of the pinned": (([9, 1, 1], [6, 1, 5]), 1),
    "beside the span": (([9, 1, 1, 9], [7, 5, 6, 4]), 3),
    "an absent entry stays": (([-INF, 3], [-1, 9]), 1),
    "none but absent ones": (([1, 2], [-1, -1]), -1),
    "no entry": (([], []), -1),
    "one entry": (([5], [0]), 0),
}


@backends
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_cases_by_hand(dtype, backend):
    """All of them in one call."""
    arena = Arena([entries for entries, _ in CASES.values()], dtype=dtype)
    options = {"num_sink_tokens": 2, "recent_window": 3, "spans": ((5, 7),)}
    slots = arena.evict(table(20), backend, **options)
    assert dict(zip(CASES, slots, strict=True)) == {name: slot for name, (_, slot) in CASES.items()}
    each = arena.evict(table(*[20] * len(CASES)), backend, **options)
    assert each == slots


@backends
def test_the_oldest_goes_where_nothing_is_scored(backend):
    arena = Arena([([0, 0, 0], [4, 2, 3]), ([0, 0], [0, 9]), ([], [])])
    assert arena.evict(table(10), backend, scored=False) == [1, 0, -1]
    assert arena.evict(table(10), backend, scored=False, num_sink_tokens=1) == [1, 1, -1]


@backends
def test_each_sequence_has_a_window_of_its_own(backend):
    segment = ([1, 0], [3, 8])
    arena = Arena([segment] * 4)
    assert arena.evict(table(9, 20), backend, recent_window=2) == [0, 0, 1, 1]
    assert arena.evict(table(9, 20, 9, 20), backend, recent_window=2) == [0, 1, 0, 1]
    assert arena.evict(table(9), backend, recent_window=20) == [0, 0, 0, 0]


@st.composite
def games(draw):
    """Entries of one or two sequences, what is protected, and the tokens of each sequence."""
    batch, heads = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    seen = [draw(st.integers(1, 40)) for _ in range(batch)]
    entries = []
    for index in range(batch * heads):
        most = seen[index // heads]
        positions = draw(st.lists(st.integers(0, most - 1), unique=True, max_size=most))
        score = st.sampled_from(SCORES) | st.floats(width=32, allow_nan=False)
        entries.append((draw(st.lists(score, min_size=len(positions), max_size=len(positions))), positions))
    bounds = st.tuples(st.integers(0, 30), st.integers(1, 9)).map(lambda span: (span[0], span[0] + span[1]))
    spans = draw(st.lists(bounds, max_size=2))
    protection = Protection.of(draw(st.integers(0, 4)), draw(st.sampled_from([0, 1, 5, 50])), spans)
    return entries, seen, heads, protection


@backends
@settings(max_examples=60, deadline=None)
@given(game=games(), gap=st.integers(0, 3), scored=st.booleans())
def test_it_is_the_entry_that_ranks_last(game, gap, scored, backend):
    """The law: `evict` names what selection at the end of a prompt would give up first."""
    entries, seen, heads, protection = game
    expected = by_definition(entries, [tokens for tokens in seen for _ in range(heads)], protection, scored)
    slots = Arena(entries, gap).evict(
        table(*seen),
        backend,
        scored=scored,
        num_sink_tokens=protection.num_sink_tokens,
        recent_window=protection.recent_window,
        spans=protection.spans,
    )
    assert slots == expected


@needs_triton
@pytest.mark.parametrize(("lengths", "parts"), [((1000, 0, 1, 1025), 1), ((9000, 20_000, 0, 5), 15), ((40_000,), 79)])
def test_long_segments_are_shared(lengths, parts):
    """Few scores, so that the least stands in many tiles and age decides between programs."""
    from kvpolicy_kernels.evict.kernel import parts_of

    torch.manual_seed(0)
    entries = [
        (torch.randint(3, (length,)).tolist(), (torch.randperm(length + 5)[:length]).tolist()) for length in lengths
    ]
    arena = Arena([([float(score) for score in scores], positions) for scores, positions in entries])
    assert parts_of(len(lengths), len(arena.positions)) == parts
    seen = table(max(lengths) + 5)
    for options in ({}, {"num_sink_tokens": 4, "recent_window": 3000}, {"spans": ((0, 45_000),)}):
        slots = arena.evict(seen, "triton", **options)
        assert slots == arena.evict(seen, "torch", **options)
        assert slots == arena.evict(seen, "triton", **options)
        for known in ([-1] * len(lengths), [7 if slot < 0 or place % 2 else -1 for place, slot in enumerate(slots)]):
            rows = table(*(7 if slot < 0 else row for slot, row in zip(slots, known, strict=True)))
            expected = [
                start + slot if row < 0 else row
                for start, slot, row in zip(arena.starts.tolist(), slots, rows.tolist(), strict=True)
            ]
            evict_into(
                rows, arena.scores, arena.positions, arena.starts, arena.lengths, seen, backend="triton", **options
            )
            assert rows.tolist() == expected


@backends
def test_candidates_by_hand(backend):
    """Two sequences of two heads: entries as far as there are any, then tokens, the first of which may be padding."""
    arena = Arena([([0, 0], [2, 0]), ([0], [3]), ([0], [1]), ([], [])], gap=1)
    fresh = table(4, 5, -1, 2).view(2, 2)
    tables = arena.positions, arena.starts, arena.lengths, table(6, 3)
    places, keys = rank(None, *tables, width=2, fresh=fresh, num_sink_tokens=1, recent_window=1, backend=backend)
    assert places.tolist() == [[2, 0, 4, 5], [3, -1, 4, 5], [1, -1, -1, 2], [-1, -1, -1, 2]]
    tiers = [[-1 if key < 0 else (key >> 61) - 1 for key in row] for row in keys.tolist()]
    assert tiers == [[0, 2, 0, 1], [0, -1, 0, 1], [0, -1, -1, 1], [-1, -1, -1, 1]]
    places, keys = rank(None, *tables, width=3, backend=backend)
    assert places.tolist() == [[2, 0, -1], [3, -1, -1], [1, -1, -1], [-1, -1, -1]]


@backends
@settings(max_examples=60, deadline=None)
@given(game=games(), gap=st.integers(0, 3), scored=st.booleans(), count=st.integers(0, 4), more=st.integers(0, 2))
def test_candidates_have_the_keys_of_the_order(game, gap, scored, count, more, backend):
    entries, seen, heads, protection = game
    arena, batch, width = Arena(entries, gap), len(seen), max(len(own) for _, own in entries) + more
    fresh = torch.stack([torch.arange(tokens, tokens + count) for tokens in seen]).to(DEVICE)
    fresh[:, :1] = -1
    scores = torch.randn(len(entries), width + count, device=DEVICE)
    places = torch.full((len(entries), width + count), ABSENT, device=DEVICE)
    for row, (_, own) in enumerate(entries):
        places[row, : len(own)] = torch.tensor(own, dtype=torch.int64)
        places[row, width:] = fresh[row // heads]
    after = torch.tensor([tokens + count for tokens in seen], device=DEVICE)
    given_scores = scores if scored else None
    found = rank(
        given_scores, arena.positions, arena.starts, arena.lengths, after, width=width, fresh=fresh if count else None,
        num_sink_tokens=protection.num_sink_tokens, recent_window=protection.recent_window, spans=protection.spans,
        backend=backend,
    )  # fmt: skip
    assert torch.equal(found[0], places)
    each = after.repeat_interleave(len(entries) // batch)[:, None]
    assert torch.equal(found[1], ranking(given_scores, places, each, protection))


@backends
@pytest.mark.parametrize("num_columns", [1, 511, 512, 513])
def test_candidates_at_the_edges_of_tiles(num_columns, backend):
    arena = Arena([([0] * num_columns, range(num_columns))] * 2)
    places, keys = rank(
        None, arena.positions, arena.starts, arena.lengths, table(600), width=num_columns, backend=backend
    )
    assert places.tolist() == [[*range(num_columns)]] * 2
    assert torch.equal(keys, ranking(None, places, table(600, 600)[:, None], Protection()))


@backends
def test_no_segment(backend):
    nothing = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    assert evict(torch.zeros(3), torch.zeros(3).int(), nothing, nothing, nothing, backend=backend).tolist() == []
    empty = evict(torch.zeros(0), torch.zeros(0).int(), table(0, 0), table(0, 0), table(1), backend=backend)
    assert empty.tolist() == [-1, -1]


INTS = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scores": torch.zeros(5)}, r"scores contiguous float32 \[4\], got torch.float32 \[5\]"),
        ({"scores": torch.zeros(4).double()}, r"scores .* got torch.float64 \[4\] with strides \[1\]"),
        ({"scores": torch.zeros(8)[::2]}, r"scores .* got torch.float32 \[4\] with strides \[2\]"),
        ({"positions": torch.zeros(4)}, r"positions contiguous int32 or int64 \[R\], got torch.float32 \[4\]"),
        ({"positions": torch.zeros(4, 1).int()}, r"positions .* got torch.int32 \[4, 1\]"),
        ({"lengths": torch.zeros(3, dtype=torch.int64)}, r"lengths contiguous int64 \[2\], got torch.int64 \[3\]"),
        ({"starts": torch.zeros(2).int()}, r"starts contiguous int64 \[2\], got torch.int32 \[2\]"),
        ({"seen": torch.zeros(2, 1).long()}, r"seen contiguous int64 \[2\], got torch.int64 \[2, 1\]"),
        ({"seen": torch.zeros(3).long()}, r"seen \[B\] with a B that divides 2 segments, got 3"),
        ({"seen": torch.zeros(0).long()}, r"seen \[B\] with a B that divides 2 segments, got 0"),
    ],
)
def test_what_does_not_fit_is_refused(wrong, message):
    right = {"scores": torch.zeros(4), "positions": torch.zeros(4).int(), "starts": INTS, "lengths": INTS, "seen": INTS}
    with pytest.raises(ValueError, match=f"evict: expected {message}"):
        evict(**right | wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scores": torch.zeros(2, 4)}, r"scores float32 \[2, 5\]"),
        ({"scores": torch.zeros(5, 2).T}, "contiguous rows"),
        ({"fresh": torch.zeros(3, 2).long()}, r"fresh int64 \[B, n\] with a B that divides 2 segments"),
        ({"fresh": torch.zeros(1, 2)}, "fresh int64"),
    ],
)
def test_candidates_that_do_not_fit_are_refused(wrong, message):
    right = {"scores": None, "positions": torch.zeros(4).int(), "starts": INTS, "lengths": INTS, "seen": INTS}
    with pytest.raises(ValueError, match=f"rank: expected .*{message}"):
        rank(**right | {"width": 3, "fresh": torch.zeros(1, 2).long()} | wrong)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_a_graph_holds_the_search():
    scores = torch.rand(20_000, device=DEVICE)
    positions = torch.randperm(20_000, device=DEVICE).int()
    starts, lengths, seen = table(0, 10_000), table(9_000, 10_000), table(20_000)
    evict(scores, positions, starts, lengths, seen)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        slots = evict(scores, positions, starts, lengths, seen)
    for length in (9_000, 0, 17):
        scores.uniform_(), lengths.fill_(length)
        graph.replay()
        assert torch.equal(slots, evict(scores, positions, starts, lengths, seen, backend="torch"))
