"""Encoding by a kernel, beside its definition; and that what it made can be appended and read back."""

import os

import pytest
import torch
from kvpolicy_kernels.append import append
from kvpolicy_kernels.encode import encode
from kvpolicy_kernels.formats import INT4, INT8, Encoded, EntryFormat

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(not (INTERPRET or DEVICE == "cuda"), reason="needs a GPU or TRITON_INTERPRET=1")
backends = pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])


@needs_triton
@pytest.mark.parametrize("entry_format", [INT8, EntryFormat(4)], ids=str)
@pytest.mark.parametrize(("dims", "counts"), [((16, 64), (1, 17)), ((80, 32), (40, 3))], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_triton_gives_the_same_bits(dtype, dims, counts, entry_format, poisoned):
    """Constant rows, rows of zeros and rows beyond fp16 among them."""
    rows = [4 * torch.randn(count, dim, device=DEVICE).to(dtype) for dim, count in zip(dims, counts, strict=True)]
    rows[0][0], rows[1][-1] = 3.5, 0.0
    if dtype == torch.float32:
        rows[1][1] *= 1e6
    for found, tensor in zip(encode(rows, entry_format, backend="triton"), rows, strict=True):
        expected = entry_format.encode(tensor)
        assert torch.equal(found.codes, expected.codes)
        assert torch.equal(found.scales, expected.scales)


@needs_triton
@pytest.mark.parametrize("entry_format", [INT4, EntryFormat(8, rotated=True)], ids=str)
@pytest.mark.parametrize("dim", [16, 96, 128])
def test_triton_rotates(dim, entry_format, poisoned):
    """Sums round in another order: a code may be the next one, where a value lies between two."""
    x = torch.randn(2, 9, dim, device=DEVICE)
    found, expected = encode([x], entry_format, backend="triton")[0], entry_format.encode(x)
    assert found.codes.shape == expected.codes.shape
    torch.testing.assert_close(found.scales.float(), expected.scales.float(), rtol=2e-3, atol=1e-4)
    raw = EntryFormat(entry_format.bits)
    apart = raw.decode(found, torch.float32) - raw.decode(expected, torch.float32)
    step = expected.scales[..., :1].float()
    assert (apart.abs() <= 1.1 * step).all()
    assert (apart.abs() > 0.5 * step).float().mean() < 0.01


@backends
@pytest.mark.parametrize("entry_format", [INT8, INT4], ids=str)
def test_appended_codes_are_the_encoded_ones(entry_format, backend):
    """A row of each of two segments; the others keep every bit."""
    keys, values = torch.randn(1, 2, 1, 32, device=DEVICE), torch.randn(1, 2, 1, 16, device=DEVICE)
    arenas = [column for dim in (32, 16) for column in entry_format.encode(torch.randn(10, dim, device=DEVICE))]
    before = [arena.clone() for arena in arenas]
    encoded = encode([keys, values], entry_format, backend=backend)
    columns, rows = [column for pair in encoded for column in pair], torch.tensor([3, 7], device=DEVICE)
    append(arenas, rows, columns, backend=backend)
    for arena, old, column in zip(arenas, before, columns, strict=True):
        assert torch.equal(arena[rows], column.reshape(2, -1))
        rest = [row for row in range(10) if row not in (3, 7)]
        assert torch.equal(arena[rest], old[rest])
    again = entry_format.decode(Encoded(arenas[0][rows], arenas[1][rows]), torch.float32)
    assert (again - keys.reshape(2, 32)).norm() <= 0.15 * keys.norm()


def test_nothing_and_what_has_no_format():
    assert encode([], INT4) == []
    with pytest.raises(ValueError, match="head dim 40 has no format"):
        encode([torch.zeros(2, 40)], INT4)


@needs_triton
def test_triton_refuses_sixteen_bits_and_takes_no_rows():
    with pytest.raises(ValueError, match="cannot do this: rows of 16 bits are not encoded"):
        encode([torch.zeros(2, 16, device=DEVICE)], EntryFormat(16), backend="triton")
    assert encode([torch.zeros(0, 16, device=DEVICE)], INT4, backend="triton")[0].codes.shape == (0, 4)
