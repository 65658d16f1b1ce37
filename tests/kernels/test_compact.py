import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kvpolicy_kernels.compact import compact, compact_in_place

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(not (INTERPRET or DEVICE == "cuda"), reason="needs a GPU or TRITON_INTERPRET=1")
backends = pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
MARK = -7
INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def check(source, source_rows, flat, backend, dtype=None, num_rows=40):
    """flat: the source as a list of rows. Every row of the result is the row that it should be, bit by bit."""
    dtype = source.dtype if dtype is None else dtype
    out = torch.full((num_rows, *flat[0].shape), MARK, dtype=dtype, device=DEVICE)
    out_rows = torch.randperm(num_rows)[: len(source_rows)].to(DEVICE)
    compact(out, out_rows, source, torch.tensor(source_rows, dtype=torch.int64, device=DEVICE), backend=backend)
    moved = dict(zip(out_rows.tolist(), source_rows, strict=True))
    for row in range(num_rows):
        expected = flat[moved[row]].to(dtype) if row in moved else torch.full_like(out[row], MARK)
        assert torch.equal(out[row], expected)


def chunk(batch, heads, length, dim, layout, dtype=torch.float32):
    """[B, H, n, D] (or [B, H, n] without dim) in one of the memory layouts that models make."""
    row = () if dim is None else (dim,)
    make = lambda *shape: (100 * torch.randn(*shape, *row, device=DEVICE)).to(dtype)  # noqa: E731
    return {
        "contiguous": lambda: make(batch, heads, length),
        "transposed": lambda: make(batch, length, heads).transpose(1, 2),
        "sliced": lambda: make(batch, heads, length + 5)[:, :, 2 : length + 2],
        "fused": lambda: make(batch, length, 3 * heads)[:, :, heads : 2 * heads].transpose(1, 2),
        "columns": lambda: make(batch, heads, length).mT.contiguous().mT,
        "expanded": lambda: make(batch, 1, length).expand(batch, heads, *([-1] * (1 + len(row)))),
    }[layout]()


LAYOUTS = ["contiguous", "transposed", "sliced", "fused", "columns", "expanded"]
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.int64])
DIMS = st.sampled_from([None, 1, 4])


@backends
@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    length=st.integers(1, 4),
    dim=DIMS,
    layout=st.sampled_from(LAYOUTS),
    dtype=DTYPES,
    data=st.data(),
)
def test_chunk(batch, heads, length, dim, layout, dtype, data, backend):
    source = chunk(batch, heads, length, dim, layout, dtype)
    flat = [source[b, h, t] for b in range(batch) for h in range(heads) for t in range(length)]
    check(source, data.draw(st.lists(st.integers(0, len(flat) - 1), max_size=40)), flat, backend)


@backends
@settings(max_examples=30, deadline=None)
@given(num_rows=st.integers(1, 20), dim=DIMS, dtype=DTYPES, data=st.data())
def test_arena(num_rows, dim, dtype, data, backend):
    source = (100 * torch.randn((num_rows,) if dim is None else (num_rows, dim), device=DEVICE)).to(dtype)
    check(source, data.draw(st.lists(st.integers(0, num_rows - 1), max_size=40)), list(source), backend)


@backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_casts_to_out(layout, dtype, backend):
    if INTERPRET and backend == "triton" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter cuts off what a bf16 cannot hold")
    source = chunk(2, 3, 4, 8, layout)
    check(source, [23, 0, 7], [row for b in source for h in b for row in h], backend, dtype)


@backends
@pytest.mark.parametrize("shape", [(1, 1, 5, 4), (1, 1, 1, 4)], ids=str)
def test_one_row_or_head_expanded(shape, backend):
    source = torch.randn(shape, device=DEVICE).expand(3, 2, 5, 4)
    check(source, [29, 4, 5], [row for b in source for h in b for row in h], backend)


@backends
def test_a_chunk_of_more_rows_than_32_bits_count(backend):
    """Expanded, so that it needs no memory."""
    rows = torch.arange(6, device=DEVICE).reshape(2, 1, 3)
    out = torch.full((3,), MARK, device=DEVICE)
    places = torch.tensor([3 * 2**31 - 1, 3 * 2**30 - 2], device=DEVICE)
    compact(out, torch.tensor([2, 0], device=DEVICE), rows.expand(2, 2**30, 3), places, backend=backend)
    assert out.tolist() == [1, MARK, 5]


@backends
@pytest.mark.parametrize("shape", [(2, 3, 0, 4), (0, 4)], ids=str)
def test_nothing_to_move(shape, backend):
    check(torch.zeros(shape, device=DEVICE), [], [torch.zeros(4, device=DEVICE)], backend)


@backends
@pytest.mark.parametrize("dtype", list(INTEGERS), ids=str)
@pytest.mark.parametrize("dim", [80, 128, 300])
@pytest.mark.parametrize("num_moved", [1, 31, 32, 33, 64, 65, 200])
def test_tiles(num_moved, dim, dtype, backend):
    """Counts at a tile's edge and one past it. Every pattern of bits, those of NaNs among them; NaN in unused rows."""
    limits = torch.iinfo(INTEGERS[dtype])
    source = torch.randint(limits.min, limits.max, (1, 2, 100, dim), dtype=INTEGERS[dtype], device=DEVICE)
    out = torch.full((300, dim), float("nan"), dtype=dtype, device=DEVICE).view(INTEGERS[dtype])
    expected = out.clone()
    out_rows, rows = (torch.randperm(n, device=DEVICE)[:num_moved] for n in (300, 200))
    expected[out_rows] = source.flatten(0, 2)[rows]
    compact(out.view(dtype), out_rows, source.view(dtype), rows, backend=backend)
    assert torch.equal(out, expected)


@backends
def test_a_strided_chunk_is_not_copied_whole(backend):
    """Nothing as large as the chunk is made: neither contiguous(), nor a reshape that copies."""
    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
            result = function(*arguments, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in known:
                made.append(result.untyped_storage().nbytes())
            return result

    source = chunk(2, 3, 500, 8, "transposed")
    out, rows = torch.zeros(9, 8, device=DEVICE), torch.tensor([1, 5], device=DEVICE)
    known = {x.untyped_storage().data_ptr() for x in (source, out, rows)}
    with Watch():
        compact(out, rows, source, torch.tensor([2999, 0], device=DEVICE), backend=backend)
    assert made, "the watch saw nothing"
    assert max(made) < source.nbytes / 100


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((7, 3), r"out \[9, 4\] needs a source \['R', 4\] or \['B', 'H', 'n', 4\], got \[7, 3\]"),
        ((7,), r"got \[7\]"),
        ((2, 7, 4), r"got \[2, 7, 4\]"),
        ((1, 2, 7, 3), r"got \[1, 2, 7, 3\]"),
    ],
    ids=str,
)
def test_a_source_that_does_not_fit_is_refused(shape, message):
    rows = torch.tensor([0])
    with pytest.raises(ValueError, match=message):
        compact(torch.zeros(9, 4), rows, torch.zeros(shape), rows)


def test_rows_that_do_not_pair_are_refused():
    with pytest.raises(ValueError, match=r"out_rows and source_rows must both be \[N\], got \[2\] and \[1\]"):
        compact(torch.zeros(9, 4), torch.tensor([0, 1]), torch.zeros(3, 4), torch.tensor([0]))


def ascending(num_segments, allocated, most):
    """Random columns int64 [S, most] and counts: an empty segment, one that stays, one that shifts, one entry."""
    columns = torch.rand(num_segments, allocated, device=DEVICE).argsort(1)[:, :most].sort(1).values
    counts = torch.randint(most + 1, (num_segments,), device=DEVICE)
    columns[1] = torch.arange(most)
    columns[2] = torch.arange(most) + allocated - most
    counts[:4] = torch.tensor([0, most, most, 1])
    columns[torch.arange(most, device=DEVICE) >= counts[:, None]] = 2**40  # nobody may look
    return columns, counts


def moved(arena, starts, columns, counts):
    expected = arena.clone()
    for start, column, count in zip(starts.tolist(), columns, counts.tolist(), strict=True):
        expected[start : start + count] = arena[start + column[:count]]
    return expected


@backends
@pytest.mark.parametrize("dtype", list(INTEGERS), ids=str)
@pytest.mark.parametrize("most", [1, 7, 1023, 1024, 1025, 2500])
def test_in_place(most, dtype, backend):
    """In arenas of several widths, all bits of all rows; segments lie in no order, with free rows between them."""
    num_segments, allocated = 6, most + most // 3 + 3
    limits = torch.iinfo(INTEGERS[dtype])
    make = lambda *shape: torch.randint(limits.min, limits.max, shape, dtype=INTEGERS[dtype], device=DEVICE)  # noqa: E731
    starts = (torch.randperm(num_segments) * (allocated + 5) + 2).to(DEVICE)
    num_rows = num_segments * (allocated + 5)
    arenas = [make(num_rows, 80), make(num_rows), make(num_rows, 1), make(17, num_rows).mT]
    ages = torch.arange(num_rows, device=DEVICE)
    columns, counts = ascending(num_segments, allocated, most)
    expected = [moved(arena, starts, columns, counts) for arena in (*arenas, ages)]
    before = starts.clone(), columns.clone(), counts.clone()
    compact_in_place([*(a.view(dtype) for a in arenas), ages], starts, columns, counts, backend=backend)
    for arena, wanted in zip((*arenas, ages), expected, strict=True):
        assert torch.equal(arena, wanted)
    assert all(torch.equal(a, b) for a, b in zip(before, (starts, columns, counts), strict=True))


@backends
def test_in_place_by_hand(backend):
    """Columns that are not contiguous: every second one of a wider table."""
    ages = torch.arange(8, device=DEVICE)
    arenas = [ages, 10.0 * torch.stack([ages, ages], 1)]
    columns = torch.tensor([[0, 9, 2], [2, 9, 3]], device=DEVICE)[:, ::2]
    starts, counts = torch.tensor([[0, 4], [2, 1]], device=DEVICE)
    compact_in_place(arenas, starts, columns, counts, backend=backend)
    assert arenas[0].tolist() == [0, 2, 2, 3, 6, 5, 6, 7]
    assert arenas[1].tolist() == [[10 * x] * 2 for x in arenas[0].tolist()]


@backends
@pytest.mark.parametrize("shape", [(0, 3), (2, 0)], ids=str)
def test_nothing_to_move_in_place(shape, backend):
    arena, zeros = torch.ones(4, 2, device=DEVICE), torch.zeros(shape[0], dtype=torch.int64, device=DEVICE)
    compact_in_place([arena], zeros, torch.zeros(shape, dtype=torch.int64, device=DEVICE), zeros, backend=backend)
    assert arena.all()


@pytest.mark.parametrize("columns", [[1, 1], [2, 1], [-1, 0]], ids=str)
def test_columns_that_do_not_ascend_are_refused(columns):
    columns, count = torch.tensor([[0, 1], columns]), torch.tensor([2, 2])
    with pytest.raises(ValueError, match="columns of a segment must ascend, and from 0 on"):
        compact_in_place([torch.zeros(9)], torch.tensor([0, 3]), columns, count)
    compact_in_place([torch.zeros(9)], torch.tensor([0, 3]), columns, torch.tensor([2, 0]))  # they do not count


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("starts", torch.zeros(3, dtype=torch.int64), r"expected starts int64 \[2\], got torch.int64 \[3\]"),
        ("counts", torch.zeros(2, dtype=torch.int32), r"expected counts int64 \[2\], got torch.int32 \[2\]"),
        ("columns", torch.zeros(2, dtype=torch.int64), r"expected columns int64 \[S, most\], got torch.int64 \[2\]"),
        ("arenas", [torch.zeros(2, 3, 4)], r"expected arenas \[R\] or \[R, D\], got \[2, 3, 4\]"),
    ],
)
def test_tables_that_do_not_fit_in_place_are_refused(name, wrong, message):
    zeros = torch.zeros(2, dtype=torch.int64)
    right = {"arenas": [torch.zeros(4)], "starts": zeros, "columns": zeros[:, None], "counts": zeros}
    with pytest.raises(ValueError, match=f"compact_in_place: {message}"):
        compact_in_place(**right | {name: wrong})


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_in_place_many_times():
    """Warps run in another order every time; a move that depended on it would show."""
    starts = 60_000 * torch.arange(8, device=DEVICE)
    arena = torch.randint(2**62, (8 * 60_000, 32), device=DEVICE)  # 256 bytes a row
    columns, counts = ascending(8, 60_000, 50_000)
    expected = moved(arena, starts, columns, counts)
    for _ in range(30):
        out = arena.clone()
        compact_in_place([out], starts, columns, counts)
        assert torch.equal(out, expected)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_rows_behind_two_to_the_31_elements():
    far = 2**24
    arena = torch.zeros(far + 6, 128, dtype=torch.uint8, device=DEVICE)
    arena[far:] = torch.randint(1, 255, (6, 128), device=DEVICE)
    last = arena[far:].clone()
    out = torch.zeros_like(arena)
    rows, out_rows = torch.tensor([far + 5, far], device=DEVICE), torch.tensor([far + 2, 7], device=DEVICE)
    for source in (arena, arena.view(2, 1, -1, 128), arena.view(1, -1, 2, 128).transpose(1, 2)):
        flat = rows if source.dim() == 2 or source.shape[1] == 1 else rows // 2 + rows % 2 * (far // 2 + 3)
        out.zero_()
        compact(out, out_rows, source, flat)
        assert torch.equal(out[out_rows], last[[5, 0]])
        assert int(out.any(1).sum()) == 2
    starts = torch.tensor([far], device=DEVICE)
    compact_in_place([arena], starts, torch.tensor([[0, 2, 5]], device=DEVICE), torch.tensor([3], device=DEVICE))
    assert torch.equal(arena[far:], last[[0, 2, 5, 3, 4, 5]])
    assert int(arena[:far].any()) == 0
