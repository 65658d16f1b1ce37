"""The laws of the formats: bytes, bounds of the error, encoding twice, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kvpolicy_kernels.formats import FORMATS, INT4, INT8, Encoded, EntryFormat, block_of, rotation

CPU = torch.device("cpu")
DIMS = [16, 64, 80, 96, 112, 128, 256]
CODED = [INT8, INT4, EntryFormat(4), EntryFormat(8, rotated=True)]


def rows(dim, seed, count=5, shift=0.0):
    """Rows of different sizes, some of whose channels stand out, as keys' do."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, dim, generator=generator) * 2.0 ** torch.randint(-6, 7, (count, 1), generator=generator)
    x[:, :: dim // 4] *= 6
    return x + shift * x.abs().amax(-1, keepdim=True)


@pytest.mark.parametrize("dim", DIMS)
def test_a_rotation_is_orthogonal_and_mixes_whole_blocks(dim):
    turn = rotation(dim, CPU).double()
    torch.testing.assert_close(turn @ turn.T, torch.eye(dim, dtype=torch.float64), atol=1e-5, rtol=0)
    block = block_of(dim)
    assert ((turn != 0).sum(1) == block).all()
    spike = torch.zeros(dim)
    spike[3] = 1.0
    assert float((spike @ turn.float()).abs().max()) == pytest.approx(block**-0.5)


def test_the_signs_never_change():
    """Rows are saved in files: other signs would read them as noise."""
    first = rotation(64, CPU)[:, 0].sign().int()
    assert sum(2**i for i, sign in enumerate(first.tolist()) if sign < 0) == 3793920668437310726


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("entry_format", CODED, ids=str)
def test_bytes_are_those_of_the_tensors(entry_format, dim):
    encoded = entry_format.encode(rows(dim, 0))
    assert sum(column.nbytes for column in encoded) == 5 * entry_format.row_bytes(dim)
    assert entry_format.row_bytes(dim) == dim * entry_format.bits // 8 + 4


def test_named_formats():
    assert {name: (f.row_bytes(64), f.row_bytes(128)) for name, f in FORMATS.items()} == {
        "int8": (68, 132),
        "int4": (36, 68),
    }
    assert EntryFormat(16).row_bytes(64) == 128
    assert [EntryFormat(16, key_channels=x).key_dim(64) for x in (1.0, 0.6, 0.5, 0.4)] == [64, 39, 32, 26]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(DIMS), st.sampled_from(CODED), st.integers(0, 10**6), st.floats(-1, 1))
def test_the_error_is_half_a_step(dim, entry_format, seed, shift):
    """In the basis in which rows are encoded, where a rotated row's error is as long as a row's own."""
    x = rows(dim, seed, shift=shift)
    encoded = entry_format.encode(x)
    step, zero = encoded.scales.float().split(1, -1)
    error = entry_format.decode(encoded, torch.float32) - x
    base = x
    if entry_format.rotated:
        error, base = error @ rotation(dim, CPU), x @ rotation(dim, CPU)
    rounding = 2.0**-11 * (zero.abs() + step * (2**entry_format.bits - 1)) + 2.0**-24
    assert (error.abs() <= step / 2 + rounding + 1e-5 * base.abs().amax(-1, keepdim=True)).all()
    spread = base.amax(-1, keepdim=True) - base.amin(-1, keepdim=True)
    assert (step <= (spread + 2.0**-10 * zero.abs()) / (2**entry_format.bits - 1) * (1 + 2.0**-10) + 2.0**-24).all()


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(DIMS), st.sampled_from(CODED), st.integers(0, 10**6), st.floats(-1, 1))
def test_encoding_what_was_decoded_changes_nothing(dim, entry_format, seed, shift):
    first = entry_format.encode(rows(dim, seed, shift=shift))
    again = entry_format.encode(entry_format.decode(first, torch.float32))
    assert torch.equal(first.codes, again.codes)
    assert torch.equal(first.scales, again.scales)


@pytest.mark.parametrize("entry_format", CODED, ids=str)
def test_rows_are_encoded_one_by_one(entry_format):
    x = rows(64, 1, count=6).reshape(2, 3, 64)
    whole = entry_format.encode(x)
    for index in ((0, 0), (1, 2)):
        assert all(torch.equal(a[index], b) for a, b in zip(whole, entry_format.encode(x[index]), strict=True))
    assert entry_format.decode(whole, torch.bfloat16).shape == (2, 3, 64)


@pytest.mark.parametrize("entry_format", CODED, ids=str)
def test_rows_that_are_constant_or_enormous(entry_format):
    constant = torch.full((1, 64), 3.0)
    torch.testing.assert_close(entry_format.decode(entry_format.encode(constant), torch.float32), constant, rtol=0.1,
                               atol=0.2)  # fmt: skip
    assert (entry_format.decode(entry_format.encode(torch.zeros(2, 64)), torch.float32) == 0).all()
    huge = entry_format.decode(entry_format.encode(torch.tensor([[1e9] + [-1e9] * 63])), torch.float32)
    assert huge.isfinite().all()


def test_words_hold_every_pattern():
    """All 65,536, each a word of two or four codes, from the lowest bits on."""
    words = torch.arange(-(2**15), 2**15).to(torch.int16)[:, None].expand(-1, 4)
    scales = torch.tensor([1.0, 0.0]).half().expand(len(words), 2)
    word = words[:, 0].int() & 0xFFFF
    for bits in (4, 8):
        decoded = EntryFormat(bits).decode(Encoded(words, scales), torch.float32)
        for j, part in enumerate(decoded.split(4, 1)):
            assert torch.equal(part, ((word >> (bits * j)) & (2**bits - 1)).float()[:, None].expand(-1, 4))


def test_sixteen_bits_are_the_rows():
    x = rows(64, 2).bfloat16()
    encoded = EntryFormat(16).encode(x)
    assert torch.equal(encoded.codes, x)
    assert encoded.scales.numel() == 0
    assert torch.equal(EntryFormat(16).decode(encoded, torch.float32), x.float())


@pytest.mark.parametrize("dim", [8, 72, 100, 272, 0])
def test_head_dims_without_a_format_are_refused(dim):
    with pytest.raises(ValueError, match=f"head dim {dim} has no format: it must be a multiple of 16, and 256 at most"):
        INT4.row_bytes(dim)
    with pytest.raises(ValueError, match="has no format"):
        INT8.encode(torch.zeros(2, dim))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": 3}, "bits must be 4, 8 or 16, got 3"),
        ({"bits": 4, "exact_recent": -1}, "exact_recent must be at least 0, got -1"),
        ({"bits": 8, "key_channels": 0.0}, r"key_channels must lie in \(0, 1\], got 0.0"),
        ({"bits": 4, "rotated": True, "key_channels": 0.6}, "got bits=4 and key_channels=0.6"),
        ({"bits": 16, "rotated": True}, "rotated where all channels are encoded"),
    ],
    ids=str,
)
def test_values_that_do_not_fit_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        EntryFormat(**values)
