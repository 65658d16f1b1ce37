import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kvpolicy_kernels.append import append, append_next

from kvpolicy.cache.arena import LayerArena
from kvpolicy.cache.layer import StoreLayer
from kvpolicy.cache.select import Protection
from kvpolicy.cache.step import StepTables, plan_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(not (INTERPRET or DEVICE == "cuda"), reason="needs a GPU or TRITON_INTERPRET=1")
backends = pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def table(*numbers):
    return torch.tensor(numbers, dtype=torch.int64, device=DEVICE)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 1, 4), (6, 4), (24,)], ids=str)
def test_writes_the_rows_and_no_others(shape, dtype, backend):
    rows = table(8, 0, 3, 11, 4, 9)
    entry = (100 * torch.randn(shape, device=DEVICE)).to(dtype)
    arenas = [torch.full(size, -1, device=DEVICE, dtype=dtype) for size in ((12, 4), (12,), (12, 1))]
    ages = torch.arange(6, device=DEVICE).to(dtype)
    append(arenas, rows, [entry, ages, ages], backend=backend)
    for arena, written in zip(arenas, (entry.reshape(6, 4), ages, ages[:, None]), strict=True):
        for row in range(12):
            expected = written[rows.tolist().index(row)] if row in rows else torch.full_like(written[0], -1)
            assert torch.equal(arena[row], expected)


@backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_casts_to_the_arena(dtype, backend):
    if INTERPRET and backend == "triton" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter cuts off what a bf16 cannot hold")
    arenas = [torch.zeros(3, 2, dtype=dtype, device=DEVICE), torch.zeros(3, dtype=torch.int32, device=DEVICE)]
    append(arenas, table(2), [torch.tensor([[1 / 3, 1e-8]], device=DEVICE), table(70_000)], backend=backend)
    assert torch.equal(arenas[0][2].cpu(), torch.tensor([1 / 3, 1e-8]).to(dtype))
    assert arenas[1].tolist() == [0, 0, 70_000]


@backends
@pytest.mark.parametrize("dtype", list(INTEGERS), ids=str)
@pytest.mark.parametrize("dim", [1, 80, 129, 2048])
def test_the_bits_are_exact(dim, dtype, backend):
    """Of every pattern, those of infinities and NaNs with a payload among them."""
    integer = INTEGERS[dtype]
    limits = torch.iinfo(integer)
    entry = torch.randint(limits.min, limits.max, (3, dim), dtype=integer, device=DEVICE)
    arena = torch.zeros(5, dim, dtype=integer, device=DEVICE)
    append([arena.view(dtype)], table(4, 0, 2), [entry.view(dtype)], backend=backend)
    assert torch.equal(arena[[4, 0, 2]], entry)
    assert not arena[[1, 3]].any()


@backends
def test_entries_and_arenas_that_are_not_contiguous(backend):
    """As a model projects them: [B, 1, H, D] transposed to [B, H, 1, D], or a part of a fused projection."""
    arenas = [torch.zeros(6, 4, device=DEVICE), torch.zeros(4, 12, device=DEVICE).mT[::2]]
    for entry in (
        torch.randn(2, 1, 3, 9, device=DEVICE)[..., 3:7].transpose(1, 2),
        torch.randn(2, 1, 9, 4, device=DEVICE)[:, :, 3:6].transpose(1, 2),
        torch.randn(4, 6, device=DEVICE).mT,
        torch.randn(6, 1, device=DEVICE).expand(6, 4),
    ):
        append(arenas, torch.arange(6, device=DEVICE), [entry, entry], backend=backend)
        for arena in arenas:
            assert torch.equal(arena, entry.reshape(6, 4))


@backends
def test_no_segment(backend):
    arena = torch.ones(3, 2, device=DEVICE)
    append([arena], table(), [torch.zeros(0, 2, device=DEVICE)], backend=backend)
    rows = append_next([arena], [torch.zeros(0, 2, device=DEVICE)], *[table()] * 4, 1, backend=backend)
    assert arena.all()
    assert rows.tolist() == []


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([torch.zeros(2, 3)], r"2 rows of an arena \[9, 4\] need an entry of shape \[2, 4\], got \[2, 3\]"),
        ([torch.zeros(2, 4)] * 2, "1 arenas need as many entries, got 2"),
    ],
)
def test_what_does_not_fit_is_refused(entries, message):
    arena = torch.zeros(9, 4)
    with pytest.raises(ValueError, match=f"append: {message}"):
        append([arena], torch.tensor([1, 2]), entries)
    with pytest.raises(ValueError, match=f"append_next: {message}"):
        append_next([arena], entries, *[torch.zeros(2, dtype=torch.int64)] * 4, 0)


# length, capacity, cursor and slot before, with two pinned entries; slot written (None: dropped), length and cursor
# after a turn of the ring, and slot written where `slots` names one
STEPS = {
    "grow": ((3, 5, 1, 0), (3, 4, 1), 3),
    "grow from nothing": ((0, 1, 0, 0), (0, 1, 0), 0),
    "ring": ((5, 5, 1, 4), (3, 5, 2), 4),
    "ring turns round": ((5, 5, 2, 0), (4, 5, 0), 0),
    "ring of one": ((3, 3, 0, 2), (2, 3, 0), 2),
    "beyond its capacity": ((5, 4, 0, 3), (2, 5, 1), 3),
    "no capacity": ((0, 0, 0, 0), (None, 0, 0), None),
    "all pinned": ((2, 2, 0, 1), (None, 2, 0), 1),
    "slot behind the others": ((4, 4, 0, 4), (2, 4, 1), None),
    "slot before the first": ((4, 4, 0, -1), (2, 4, 1), None),
}


@backends
@pytest.mark.parametrize("dim", [3, 2048])
@pytest.mark.parametrize("named", [False, True], ids=["ring", "slots"])
def test_steps_by_hand(named, dim, backend):
    """All of them in one call, as segments of 8 rows."""
    lengths, capacities, cursors, slots = (
        table(*column) for column in zip(*(s[0] for s in STEPS.values()), strict=True)
    )
    starts = 8 * torch.arange(len(STEPS), device=DEVICE)
    buffers = [
        torch.full((8 * len(STEPS) + 1, dim), float("nan"), device=DEVICE),
        torch.full((8 * len(STEPS) + 1,), -9, device=DEVICE),
    ]
    arenas = [buffer[1:] for buffer in buffers]  # so that row -1 is seen
    entries = [torch.randn(len(STEPS), dim, device=DEVICE), torch.arange(len(STEPS), device=DEVICE)]
    expected = [buffer.clone() for buffer in buffers]
    rows = append_next(
        arenas, entries, starts, lengths, capacities, cursors, 2, slots=slots if named else None, backend=backend
    )
    for i, ((_, _, cursor, _), (turn, length, turned), slot) in enumerate(STEPS.values()):
        written = slot if named else turn
        assert rows[i] == (-1 if written is None else 8 * i + written), list(STEPS)[i]
        assert (lengths[i], cursors[i]) == (length, cursor if named else turned), list(STEPS)[i]
        if written is not None:
            for arena, entry in zip(expected, entries, strict=True):
                arena[1 + 8 * i + written] = entry[i]
    for arena, wanted in zip(buffers, expected, strict=True):
        assert torch.equal(arena.nan_to_num(-9), wanted.nan_to_num(-9))


@backends
@settings(max_examples=20, deadline=None)
@given(capacities=st.lists(st.integers(3, 9), min_size=1, max_size=4), pinned=st.integers(0, 2))
def test_the_ring_is_the_window_rule(capacities, pinned, backend):
    """The law: step after step, `append_next` is what a store's plan works out on the host."""
    count = len(capacities)
    host = LayerArena(count, 1, 1, torch.float32, torch.device("cpu"), num_pinned=pinned, scored=False)
    layer = StoreLayer(0, host, 1, count, Protection(num_sink_tokens=pinned), scores_stay=True)
    layer.allow(torch.tensor([capacities]))
    limit = table(*capacities)
    starts = limit.cumsum(0) - limit
    lengths, cursors = torch.zeros_like(limit), torch.zeros_like(limit)
    arena = torch.full((int(limit.sum()),), -1, dtype=torch.int64, device=DEVICE)
    entry, tables = torch.zeros(1, count, 1, 1), StepTables()
    for age in range(25):
        step = plan_step([layer], tables, evict=True, grows=False).next(0, layer)
        layer.write(entry, entry, step, 0.0, None)
        rows = append_next(
            [arena], [torch.full_like(starts, age)], starts, lengths, limit, cursors, pinned, backend=backend
        )
        assert torch.equal((rows - starts).cpu(), step.row - step.start)
        assert torch.equal(lengths.cpu(), host.length)
        assert torch.equal(cursors.cpu(), host.cursor)
        assert (arena[rows] == age).all()


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        (
            "lengths",
            torch.zeros(3, dtype=torch.int64),
            r"expected lengths contiguous int64 \[2\], got torch.int64 \[3\]",
        ),
        ("cursors", torch.zeros(2, dtype=torch.int32), r"expected cursors .* got torch.int32 \[2\] with strides \[1\]"),
        ("capacities", torch.ones(1, dtype=torch.int64).expand(2), r"expected capacities .* \[2\] with strides \[0\]"),
        ("slots", torch.zeros(2, 1, dtype=torch.int64), r"expected slots .* got torch.int64 \[2, 1\]"),
    ],
)
def test_tables_that_do_not_fit_are_refused(name, wrong, message):
    names = ("starts", "lengths", "capacities", "cursors", "slots")
    tables = {name: torch.zeros(2, dtype=torch.int64) for name in names} | {name: wrong}
    with pytest.raises(ValueError, match=message):
        append_next([torch.zeros(4)], [torch.zeros(2)], num_pinned=0, **tables)


def test_arenas_of_more_dimensions_are_refused():
    with pytest.raises(ValueError, match=r"append: expected arenas \[R\] or \[R, D\], got \[4, 2, 3\]"):
        append([torch.zeros(4, 2, 3)], torch.tensor([0]), [torch.zeros(1, 2, 3)])


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_a_graph_holds_the_steps():
    starts, capacities = table(0, 5), table(5, 3)
    lengths, cursors, age = table(0, 0), table(0, 0), table(0, 0)
    arena = torch.full((8,), -1, dtype=torch.int64, device=DEVICE)
    step = lambda: append_next([arena], [age], starts, lengths, capacities, cursors, 1)  # noqa: E731
    step()  # compiles
    arena.fill_(-1), lengths.zero_(), cursors.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows = step()
        age += 1
    for _ in range(9):
        graph.replay()
    # ages 5 to 8 and 7 to 8, behind the pinned first one
    assert arena.tolist() == [0, 5, 6, 7, 8, 0, 7, 8]
    assert (rows.tolist(), lengths.tolist(), cursors.tolist()) == ([4, 7], [5, 3], [0, 0])


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_rows_behind_two_to_the_31_elements():
    arena = torch.zeros(2**24 + 4, 128, dtype=torch.uint8, device=DEVICE)
    entry = torch.randint(1, 255, (2, 128), dtype=torch.uint8, device=DEVICE)
    append([arena], table(2**24 + 1, 3), [entry])
    assert torch.equal(arena[[2**24 + 1, 3]], entry)
    rows = append_next([arena], [entry], table(2**24, 0), table(2, 0), table(3, 1), table(0, 0), 0)
    assert rows.tolist() == [2**24 + 2, 0]
    assert torch.equal(arena[rows], entry)
    assert int(arena.any(1).sum()) == 4
