import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kvpolicy_kernels.rebuild import rebuild
from kvpolicy_kernels.rebuild.op import Chosen

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(not (INTERPRET or DEVICE == "cuda"), reason="needs a GPU or TRITON_INTERPRET=1")
backends = pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
MARK = -7.0


def table(*numbers):
    return torch.tensor(numbers, dtype=torch.int64, device=DEVICE)


def chosen(columns, counts, width, former, gap=0):
    """columns: of each segment, as long as they count; behind them stands what would be an error if it were read."""
    most = max(map(len, columns))
    padded = torch.tensor([[*own, *[2**40] * (most - len(own))] for own in columns], dtype=torch.int64, device=DEVICE)
    starts = [sum(counts[:i]) + gap * i for i in range(len(counts))]
    return Chosen(padded.view(len(columns), most), table(*starts), table(*map(len, columns)), table(*former), width)


@backends
def test_by_hand(backend):
    """Two sequences of one KV head: the first keeps an entry and a token, the second two tokens, with a free row."""
    held = torch.tensor([[10.0, 11.0], [20.0, 21.0], [30.0, 31.0]], device=DEVICE)
    fresh = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]], [[[5.0, 6.0], [7.0, 8.0]]]], device=DEVICE)
    out, numbers = torch.full((5, 2), MARK, device=DEVICE), torch.full((5,), -7, dtype=torch.int32, device=DEVICE)
    which = chosen([[1, 3], [2, 3]], [2, 2], 2, [1, 0], gap=1)
    positions = table(4, 5, 6, 7, 0, -1, 1, 2).view(2, 4)
    rebuild([out], which, [held], [fresh], [(numbers, positions)], backend=backend)
    assert out.tolist() == [[30, 31], [3, 4], [MARK, MARK], [5, 6], [7, 8]]
    assert numbers.tolist() == [5, 7, -7, 1, 2]


@backends
def test_each_source_leaves_the_rows_of_the_other_alone(backend):
    held, fresh = torch.ones(4, 3, device=DEVICE), torch.full((1, 1, 2, 3), 2.0, device=DEVICE)
    which = chosen([[0, 4, 2]], [3], 4, [0])
    out = torch.full((3, 3), MARK, device=DEVICE)
    rebuild([out], which, None, [fresh], backend=backend)
    assert out[:, 0].tolist() == [MARK, 2, MARK]
    rebuild([out], which, [held], None, backend=backend)
    assert out.tolist() == [[1] * 3, [2] * 3, [1] * 3]


@backends
@settings(max_examples=40, deadline=None)
@given(data=st.data(), batch=st.integers(1, 3), heads=st.integers(1, 3), num_tokens=st.integers(0, 5))
def test_every_row_is_its_candidate(data, batch, heads, num_tokens, backend):
    """Ragged segments, an empty one among them, rows that are free between them, and tensors of every layout."""
    count, dims, dtypes = batch * heads, (4, 3), (torch.bfloat16, torch.float32)
    lengths = data.draw(st.lists(st.integers(0, 5), min_size=count, max_size=count))
    width, former = max(lengths), [sum(lengths[:i]) for i in range(count)]
    candidates = [[*range(own), *range(width, width + num_tokens)] for own in lengths]
    columns = [data.draw(st.lists(st.sampled_from(own), unique=True)) if own else [] for own in candidates]
    gap = data.draw(st.integers(0, 2))
    which = chosen(columns, [*map(len, columns)], width, former, gap)
    held = [torch.randn(sum(lengths), dim, device=DEVICE).to(kind) for dim, kind in zip(dims, dtypes, strict=True)]
    strided = torch.randn(batch, num_tokens, heads + 1, sum(dims), device=DEVICE).transpose(1, 2)[:, 1:]
    fresh = [strided[..., : dims[0]].to(dtypes[0]), strided[..., dims[0] :]]
    rows = sum(map(len, columns)) + gap * count
    outs = [
        torch.full((rows, dim), float("nan"), device=DEVICE).to(kind) for dim, kind in zip(dims, dtypes, strict=True)
    ]
    scores, own = (
        torch.randn(count, width + num_tokens, device=DEVICE),
        torch.full((rows,), float("nan"), device=DEVICE),
    )
    rebuild(outs, which, held, fresh, [(own, scores)], backend=backend)
    written = torch.zeros(rows, dtype=torch.bool)
    for segment, chosen_here in enumerate(columns):
        b, h = divmod(segment, heads)
        for j, column in enumerate(chosen_here):
            row = int(which.starts[segment]) + j
            written[row] = True
            assert own[row] == scores[segment, column]
            for out, entries, tokens in zip(outs, held, fresh, strict=True):
                source = entries[former[segment] + column] if column < width else tokens[b, h, column - width]
                assert torch.equal(out[row], source)
    for out in (*outs, own):
        assert out[~written.to(DEVICE)].isnan().all()


@backends
@pytest.mark.parametrize("dim", [1, 80, 128])
@pytest.mark.parametrize("num_kept", [0, 1, 31, 32, 33, 128, 129])
def test_tiles(num_kept, dim, backend):
    """Counts at a tile's edge and one past it; codes and their scales beside one another, every pattern of bits."""
    codes = torch.randint(-(2**15), 2**15, (400, dim), dtype=torch.int16, device=DEVICE)
    scales = torch.randint(-(2**15), 2**15, (400, 2), dtype=torch.int16, device=DEVICE)
    columns = [torch.randperm(200)[:num_kept].tolist() for _ in range(2)]
    which = chosen(columns, [num_kept] * 2, 200, [0, 200])
    outs = [torch.full_like(codes, 3), torch.full_like(scales, 3).view(torch.float16)]
    rebuild(outs, which, [codes, scales.view(torch.float16)], None, backend=backend)
    source = [*columns[0], *(200 + column for column in columns[1])]
    assert torch.equal(outs[0][: 2 * num_kept], codes[source])
    assert torch.equal(outs[1].view(torch.int16)[: 2 * num_kept], scales[source])
    assert bool((outs[0][2 * num_kept :] == 3).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"held": [torch.zeros(3, 5)]}, "as wide"),
        ({"fresh": [torch.zeros(1, 2, 4)]}, "as wide"),
        ({"outs": [torch.zeros(4, 8)[:, ::2]]}, "contiguous rows"),
        ({"numbers": [(torch.zeros(4), torch.zeros(2, 3))]}, "numbers"),
        ({"chosen": Chosen(torch.zeros(1, 2), *torch.zeros(3, 1, dtype=torch.int64), 3)}, "columns int64"),
        ({"chosen": Chosen(torch.zeros(2, 1, dtype=torch.int64).T, *torch.zeros(3, 1, dtype=torch.int64), 3)}, None),
        ({"chosen": Chosen(torch.zeros(1, 4, dtype=torch.int64)[:, ::2], *torch.zeros(3, 1).long(), 3)}, "strides"),
    ],
)
def test_refusals(change, message):
    given = {"outs": [torch.zeros(4, 4)], "held": [torch.zeros(3, 4)], "fresh": None}
    given["chosen"] = Chosen(torch.zeros(1, 2, dtype=torch.int64), *torch.zeros(3, 1, dtype=torch.int64), 3)
    given |= change
    if message is None:  # a column of one number has no stride
        rebuild(**given)
        return
    with pytest.raises(ValueError, match=message):
        rebuild(**given)
