import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kvpolicy_kernels.compact import compact

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MARK = -7


def check(source, source_rows, flat, dtype=None, num_rows=40):
    """flat: the source as a list of rows. Every row of the result is the row that it should be, bit by bit."""
    dtype = source.dtype if dtype is None else dtype
    out = torch.full((num_rows, *flat[0].shape), MARK, dtype=dtype, device=DEVICE)
    out_rows = torch.randperm(num_rows)[: len(source_rows)].to(DEVICE)
    compact(out, out_rows, source, torch.tensor(source_rows, dtype=torch.int64, device=DEVICE))
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


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), DIMS, st.sampled_from(LAYOUTS), DTYPES, st.data())
def test_chunk(batch, heads, length, dim, layout, dtype, data):
    source = chunk(batch, heads, length, dim, layout, dtype)
    flat = [source[b, h, t] for b in range(batch) for h in range(heads) for t in range(length)]
    check(source, data.draw(st.lists(st.integers(0, len(flat) - 1), max_size=40)), flat)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), DIMS, DTYPES, st.data())
def test_arena(num_rows, dim, dtype, data):
    source = (100 * torch.randn((num_rows,) if dim is None else (num_rows, dim), device=DEVICE)).to(dtype)
    check(source, data.draw(st.lists(st.integers(0, num_rows - 1), max_size=40)), list(source))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_casts_to_out(layout):
    source = chunk(2, 3, 4, 8, layout)
    check(source, [23, 0, 7], [row for b in source for h in b for row in h], torch.bfloat16)


@pytest.mark.parametrize("shape", [(1, 1, 5, 4), (1, 1, 1, 4)], ids=str)
def test_one_row_or_head_expanded(shape):
    source = torch.randn(shape, device=DEVICE).expand(3, 2, 5, 4)
    check(source, [29, 4, 5], [row for b in source for h in b for row in h])


@pytest.mark.parametrize("shape", [(2, 3, 0, 4), (0, 4)], ids=str)
def test_nothing_to_move(shape):
    check(torch.zeros(shape, device=DEVICE), [], [torch.zeros(4, device=DEVICE)])


def test_a_strided_chunk_is_not_copied_whole(monkeypatch):
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
        compact(out, rows, source, torch.tensor([2999, 0], device=DEVICE))
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
