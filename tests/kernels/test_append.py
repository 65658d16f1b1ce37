import pytest
import torch
from kvpolicy_kernels.append import append

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 1, 4), (6, 4), (24,)], ids=str)
def test_writes_the_rows_and_no_others(shape, dtype):
    rows = torch.tensor([8, 0, 3, 11, 4, 9], device=DEVICE)
    entry = (100 * torch.randn(shape, device=DEVICE)).to(dtype)
    arenas = [torch.full(size, -1, device=DEVICE, dtype=dtype) for size in ((12, 4), (12,), (12, 1))]
    ages = torch.arange(6, device=DEVICE).to(dtype)
    append(arenas, rows, [entry, ages, ages])
    for arena, written in zip(arenas, (entry.reshape(6, 4), ages, ages[:, None]), strict=True):
        for row in range(12):
            expected = written[rows.tolist().index(row)] if row in rows else torch.full_like(written[0], -1)
            assert torch.equal(arena[row], expected)


def test_casts_to_the_arena():
    arena = torch.zeros(3, 2, dtype=torch.bfloat16, device=DEVICE)
    append([arena], torch.tensor([2], device=DEVICE), [torch.tensor([[1 / 3, 1e-8]], device=DEVICE)])
    assert torch.equal(arena[2].cpu(), torch.tensor([1 / 3, 1e-8]).bfloat16())


def test_entries_that_are_not_contiguous():
    """As a model projects them: [B, 1, H, D] transposed to [B, H, 1, D]."""
    entry = torch.randn(2, 1, 3, 4, device=DEVICE).transpose(1, 2)
    arena = torch.zeros(6, 4, device=DEVICE)
    append([arena], torch.arange(6, device=DEVICE), [entry])
    assert torch.equal(arena[4], entry[1, 1, 0])


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([torch.zeros(2, 3)], r"2 rows of an arena \[9, 4\] need an entry of shape \[2, 4\], got \[2, 3\]"),
        ([torch.zeros(2, 4)] * 2, "1 arenas need as many entries, got 2"),
    ],
)
def test_what_does_not_fit_is_refused(entries, message):
    arena = torch.zeros(9, 4)
    with pytest.raises(ValueError, match=message):
        append([arena], torch.tensor([1, 2]), entries)
