import os

import pytest
import torch
from kvpolicy_kernels.append import append

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
    assert arena.all()


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


def test_arenas_of_more_dimensions_are_refused():
    with pytest.raises(ValueError, match=r"append: expected arenas \[R\] or \[R, D\], got \[4, 2, 3\]"):
        append([torch.zeros(4, 2, 3)], torch.tensor([0]), [torch.zeros(1, 2, 3)])


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_rows_behind_two_to_the_31_elements():
    arena = torch.zeros(2**24 + 4, 128, dtype=torch.uint8, device=DEVICE)
    entry = torch.randint(1, 255, (2, 128), dtype=torch.uint8, device=DEVICE)
    append([arena], table(2**24 + 1, 3), [entry])
    assert torch.equal(arena[[2**24 + 1, 3]], entry)
    assert int(arena.any(1).sum()) == 2
