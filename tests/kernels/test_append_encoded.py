"""A token that is encoded and written in one launch, with its copy: as `encode`, `append` and the definition do it."""

import os

import pytest
import torch
from kvpolicy_kernels.append_encoded import append_encoded
from kvpolicy_kernels.encode import encode
from kvpolicy_kernels.formats import INT4, INT8, Encoded, EntryFormat
from kvpolicy_kernels.segments import ExactCopies

from tests.kernels.segments import key_centre

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(not (INTERPRET or DEVICE == "cuda"), reason="needs a GPU or TRITON_INTERPRET=1")
backends = pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
BATCH, HEADS, SLOTS, SINKS, ROWS = 3, 2, 9, 4, 40
HEAD_OF = torch.arange(BATCH * HEADS, device=DEVICE) % HEADS


def made(entry_format, dims, dtype=torch.float32):
    """Columns, arenas of positions and scores, and copies, all full of what must stay."""
    columns = [
        Encoded(
            torch.full((ROWS, dim // entry_format.codes_in_word), 77, dtype=torch.int16, device=DEVICE),
            torch.full((ROWS, 2), 7.0, dtype=torch.float16, device=DEVICE),
        )
        for dim in dims
    ]
    arenas = [
        torch.full((ROWS,), -1, dtype=torch.int32, device=DEVICE),
        torch.full((ROWS,), -3.0, device=DEVICE),
    ]
    key, value = (torch.full((BATCH, HEADS, SLOTS, dim), 5.0, dtype=dtype, device=DEVICE) for dim in dims)
    slots = torch.full((BATCH, SLOTS), -1, dtype=torch.int32, device=DEVICE)
    return columns, arenas, ExactCopies(key, value, slots, SINKS)


@pytest.mark.parametrize("with_copies", [True, False])
@pytest.mark.parametrize("pairs", [3, 0, None])
@pytest.mark.parametrize("entry_format", [INT4, INT8, EntryFormat(4)], ids=str)
@pytest.mark.parametrize("dims", [(32, 16), (80, 64)], ids=str)
@backends
def test_a_token(backend, dims, entry_format, pairs, with_copies):
    """Of a sink, of a token in the ring, and of one behind its end; entries that are not contiguous.

    pairs: of the keys' centre, None for none
    """
    centre = None if pairs is None else key_centre(HEADS, dims[0], pairs=pairs)
    key, value = (torch.randn(BATCH, 1, HEADS, 2 * dim, device=DEVICE)[..., :dim].transpose(1, 2) for dim in dims)
    columns, arenas, copies = made(entry_format, dims)
    rows = torch.tensor([3, 30, 9, 0, 17, 39], device=DEVICE)
    positions = torch.tensor([2, 6, 4 + 5 * 7], device=DEVICE).repeat_interleave(HEADS)
    numbers = [positions, torch.full((BATCH * HEADS,), 0.5, device=DEVICE)]
    append_encoded(
        columns, rows, [key, value], entry_format, positions=positions, arenas=arenas, numbers=numbers,
        copies=copies if with_copies else None, key_centre=centre, backend=backend,
    )  # fmt: skip
    others = torch.ones(ROWS, dtype=torch.bool, device=DEVICE)
    others[rows] = False
    encoded_key = key if centre is None else key - centre.of(HEAD_OF, positions).view(BATCH, HEADS, 1, -1)
    for column, expected in zip(columns, encode([encoded_key, value], entry_format, backend=backend), strict=True):
        assert torch.equal(column.codes[rows], expected.codes.flatten(0, 2))
        assert torch.equal(column.scales[rows], expected.scales.flatten(0, 2))
        assert (column.codes[others] == 77).all()
        assert (column.scales[others] == 7).all()
    assert torch.equal(arenas[0][rows], positions.int())
    assert (arenas[0][others] == -1).all()
    assert (arenas[1] == torch.where(others, -3.0, 0.5)).all()
    own, counted = copies.positions.tolist(), torch.zeros(BATCH, SLOTS, dtype=torch.bool, device=DEVICE)
    if with_copies:
        for b, (position, slot) in enumerate([(2, 2), (6, 4 + 6 % 5), (39, 4 + 39 % 5)]):
            counted[b, slot] = True
            assert own[b][slot] == position
            for held, entry in ((copies.key, key), (copies.value, value)):
                assert torch.equal(held[b, :, slot], entry[b, :, 0])
    assert (copies.positions[~counted] == -1).all()
    for held in (copies.key, copies.value):
        assert (held.transpose(1, 2)[~counted] == 5).all()


@needs_triton
def test_a_row_below_zero_is_left_out():
    """As `append` has it: the row was not found."""
    key, value = (torch.randn(BATCH, HEADS, 1, 16, device=DEVICE) for _ in range(2))
    columns, arenas, _ = made(INT4, (16, 16))
    rows = torch.tensor([-1, 3, -1, -1, 4, -1], device=DEVICE)
    positions = torch.arange(6, device=DEVICE)
    append_encoded(
        columns, rows, [key, value], INT4, positions=positions, arenas=arenas[:1], numbers=[positions], backend="triton"
    )
    assert (arenas[0] >= 0).nonzero()[:, 0].tolist() == [3, 4]
    assert (columns[0].codes != 77).any(1).nonzero()[:, 0].tolist() == [3, 4]


def test_what_does_not_fit_is_refused():
    columns, arenas, _ = made(INT4, (16, 16))
    entries, rows = [torch.zeros(1, 2, 1, 16, device=DEVICE)] * 2, torch.tensor([1, 2], device=DEVICE)
    with pytest.raises(ValueError, match="as many arenas as numbers and 2 positions, got 2, 2, 1 and 0, and 2"):
        append_encoded(columns, rows, entries, INT4, positions=rows, arenas=arenas[:1])
    with pytest.raises(ValueError, match=r"2 rows of 8 words need an entry of 2 rows, got \[1, 2, 1, 16\]"):
        append_encoded(columns, rows, entries, INT8, positions=rows)
    with pytest.raises(ValueError, match=r"a key_centre of shape \[num_kv_heads, 16\] for 2 segments, got \(3, 16\)"):
        append_encoded(columns, rows, entries, INT4, positions=rows, key_centre=key_centre(3, 16))
