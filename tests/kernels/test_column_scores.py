import itertools
import math
import os
from dataclasses import replace

import pytest
import torch
from kvpolicy_kernels.attention import reference
from kvpolicy_kernels.column_scores import column_scores
from kvpolicy_kernels.segments import Chunk, Segments

from tests.kernels.segments import interleaved

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(not (INTERPRET or DEVICE == "cuda"), reason="needs a GPU or TRITON_INTERPRET=1")
nan_queries = pytest.mark.filterwarnings("ignore:All-NaN slice")  # the interpreter's maximum of such a row
NAN = float("nan")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Of the torch path."""
    monkeypatch.setattr(reference, "BLOCK", 4)


def arena(lengths, dim=8, dtype=torch.float32):
    """Segments in reverse order; before, between and after them a row of NaN and infinity. All values are NaN."""
    keys = torch.full((sum(lengths) + len(lengths) + 1, dim), NAN)
    keys[:, ::2] = float("inf")
    starts, row = [0] * len(lengths), 1
    for i in reversed(range(len(lengths))):
        starts[i] = row
        keys[row : row + lengths[i]] = torch.randn(lengths[i], dim)
        row += lengths[i] + 1
    return of_keys(keys.to(DEVICE, dtype), starts, lengths)


def of_keys(keys, starts, lengths):
    """Segments whose values are NaN: nobody looks at them."""
    return Segments(keys, torch.full_like(keys, NAN), torch.tensor(starts), torch.tensor(lengths))


def oracle(query, segments, chunk=None, *, scale=None, softcap=None, sink_logits=None, query_mask=None, power=1.0,
           reduction="sum"):  # fmt: skip
    """One query at a time in fp64; every visible column gets its weight."""
    batch, num_q_heads, n, dim = query.shape
    num_kv_heads = len(segments) // batch
    m, longest = 0 if chunk is None else chunk.key.shape[2], int(max(segments.lengths))
    mask = None if chunk is None else chunk.mask
    out = torch.zeros(batch, num_kv_heads, longest + m, dtype=torch.float64)
    for b, hq, i in itertools.product(range(batch), range(num_q_heads), range(n)):
        if query_mask is not None and not query_mask[b, i]:
            continue
        h = hq // (num_q_heads // num_kv_heads)
        start, length = (int(x[b * num_kv_heads + h]) for x in (segments.starts, segments.lengths))
        row = [j <= i + m - n for j in range(m)] if mask is None else mask[b % len(mask), 0, i]
        tokens = [j for j in range(m) if row[j]]
        k = segments.keys[start : start + length]
        k = k if chunk is None else torch.cat([k, chunk.key[b, h, tokens]])
        x = k.cpu().double() @ query[b, hq, i].cpu().double() * (dim**-0.5 if scale is None else scale)
        x = x if softcap is None else softcap * (x / softcap).tanh()
        total = x.exp().sum() + (0 if sink_logits is None else math.exp(sink_logits[hq]))
        columns = [*range(length), *(longest + j for j in tokens)]
        given = (x.exp() / total) ** power
        out[b, h, columns] = (
            torch.maximum(out[b, h, columns], given) if reduction == "max" else out[b, h, columns] + given
        )
    return out


def check(query, segments, chunk=None, backend="torch", **kwargs):
    """The error is at most twice torch's, and nothing stands where nothing belongs."""
    out = column_scores(query, segments, chunk, **kwargs, backend=backend).cpu()
    plain = column_scores(query, segments, chunk, **kwargs, backend="torch").cpu()
    exact = oracle(query, segments, chunk, **kwargs)
    assert out.dtype == torch.float32
    torch.testing.assert_close(plain.double(), exact, atol=2e-5, rtol=1e-5)
    assert (out[exact == 0] == 0).all(), "an absent or invisible column got mass"
    error, allowed = (float((x.double() - exact).abs().max()) if x.numel() else 0.0 for x in (out, plain))
    assert error <= 2 * allowed + 1e-5, f"error {error:.2e}, torch {allowed:.2e}"


# batch, query heads, lengths of the segments, queries, tokens of the chunk or None, head dim
CASES = [
    (1, 3, [5], 1, None, 8),
    (1, 6, [7, 0], 9, None, 8),
    (2, 2, [3, 1, 0, 6], 3, 3, 8),
    (1, 3, [0], 9, 9, 8),
    (1, 2, [4, 0], 6, 2, 8),
    (2, 3, [2, 11], 5, 7, 8),
    (1, 1, [0], 2, None, 8),
]
VARIANTS = [{}, {"softcap": 2.0}, {"sinks": True}, {"scale": 0.6}, {"power": 2.0, "sinks": True}]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def inputs(case, variant, dtype=torch.float32):
    batch, num_q_heads, lengths, n, m, dim = case
    torch.manual_seed(sum(lengths) + n)
    query = torch.randn(batch, num_q_heads, n, dim).to(DEVICE, dtype)
    kwargs = {name: x for name, x in variant.items() if name != "sinks"}
    if "sinks" in variant:
        kwargs["sink_logits"] = torch.linspace(-1, 2, num_q_heads, device=DEVICE)
    chunk = None
    if m is not None:
        key = torch.randn(batch, len(lengths) // batch, m, dim).to(DEVICE, dtype)
        chunk = Chunk(key, torch.full_like(key, NAN))
    return (query, arena(lengths, dim, dtype), chunk), kwargs


def masked(case, arguments, shared=False):
    """Random masks of the chunk; the first query sees none of it. Padding queries are NaN, as from padding tokens."""
    batch, _, _, n, m, _ = case
    mask = torch.rand(1 if shared else batch, 1, n, m) < 0.5
    mask[:, :, 0] = False
    counts = torch.rand(batch, n) < 0.5
    query, segments, chunk = arguments
    query[~counts.to(DEVICE)[:, None].expand(query.shape[:3])] = NAN
    return (query, segments, replace(chunk, mask=mask.to(DEVICE))), {"query_mask": counts.to(DEVICE)}


def skip_what_the_interpreter_cannot(dtype):
    if INTERPRET and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bf16 as integers")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch_matches_the_definition(case, variant, dtype):
    arguments, kwargs = inputs(case, variant, dtype)
    check(*arguments, **kwargs)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_triton_matches_the_definition(case, variant, dtype, poisoned):
    skip_what_the_interpreter_cannot(dtype)
    arguments, kwargs = inputs(case, variant, dtype)
    check(*arguments, "triton", **kwargs)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("case", [c for c in CASES if c[4]], ids=str)
def test_torch_masks(case, shared, variant):
    arguments, kwargs = inputs(case, variant)
    arguments, mask = masked(case, arguments, shared)
    check(*arguments, **kwargs, **mask)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_largest_weight_instead_of_the_sum(case, variant):
    arguments, kwargs = inputs(case, variant)
    check(*arguments, **kwargs, reduction="max")
    if case[4]:
        arguments, mask = masked(case, arguments)
        check(*arguments, **kwargs, **mask, reduction="max")


@needs_triton
@nan_queries
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("case", [c for c in CASES if c[4]], ids=str)
def test_triton_masks(case, shared, variant, poisoned):
    arguments, kwargs = inputs(case, variant)
    arguments, mask = masked(case, arguments, shared)
    check(*arguments, "triton", **kwargs, **mask)


# edges of the tiles and one past: 64 and 32 in fp32 up to head dim 64, 32 up to 128, 16 above; 128 and 64 in 16 bits
EDGES = [
    (1, 8, [128, 129], 16, None, 64),
    (1, 6, [32, 33, 0], 33, 33, 16),
    (1, 5, [0], 26, 129, 80),
    (1, 7, [127], 19, 128, 96),
    (1, 16, [70], 8, 8, 16),
    (2, 1, [0, 200], 1, 40, 256),
]


@needs_triton
@pytest.mark.parametrize("programs", [1, 5, 528], ids=lambda n: f"programs{n}")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", EDGES, ids=str)
def test_triton_tile_edges(case, dtype, programs, poisoned, monkeypatch):
    """One walk over all keys, and the walk in parts."""
    from kvpolicy_kernels.column_scores import kernel

    skip_what_the_interpreter_cannot(dtype)
    monkeypatch.setattr(kernel, "PROGRAMS", programs)
    arguments, kwargs = inputs(case, {"sinks": True} if programs == 5 else {}, dtype)
    check(*arguments, "triton", **kwargs)


@needs_triton
@nan_queries
def test_triton_a_long_prompt_with_padding(poisoned):
    """Several blocks of rows, tiles of columns and sequences under an explicit causal mask."""
    case = (2, 4, [0, 0, 0, 0], 70, 100, 16)
    (query, segments, chunk), _ = inputs(case, {})
    padding = torch.arange(100)[None] < torch.tensor([[37], [0]])  # tokens on the left
    mask = (torch.ones(70, 100).tril(30).bool() & ~padding[:, None])[:, None]
    counts = ~padding[:, 30:]
    query[0, :, :7], chunk.key[0, :, :37] = NAN, NAN
    check(query, segments, replace(chunk, mask=mask.to(DEVICE)), "triton", query_mask=counts.to(DEVICE))


@needs_triton
@nan_queries
@pytest.mark.parametrize("inner", [1, 2], ids=["rows", "elements"])
def test_triton_inputs_that_are_not_contiguous(inner, poisoned):
    """Every argument but the arena is a view with strides of its own; the last dimension is strided too, or not."""
    case = (2, 6, [40, 0, 9, 64], 5, 35, 24)
    (query, segments, chunk), mask = masked(case, inputs(case, {})[0])
    expected = column_scores(query, segments, chunk, **mask, backend="triton")

    def strided(x, inner=1):
        wide = torch.full((*x.transpose(0, -2).shape[:-1], 2 * inner * x.shape[-1]), 7).to(x.device, x.dtype)
        view = wide[..., : inner * x.shape[-1] : inner].transpose(0, -2)
        assert not view.is_contiguous()
        return view.copy_(x)

    chunk = Chunk(strided(chunk.key, inner), chunk.value, strided(chunk.mask))
    query_mask = strided(mask["query_mask"])
    out = column_scores(strided(query, inner), segments, chunk, query_mask=query_mask, backend="triton")
    assert torch.equal(out, expected)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
def test_keys_and_values_of_one_arena(backend, case, poisoned):
    """Rows that are longer than a key."""
    (query, segments, chunk), kwargs = inputs(case, {"sinks": True})
    check(query, interleaved(segments), chunk, backend, **kwargs)


@needs_triton
def test_triton_gives_equal_bits(poisoned):
    """Twice, from tables on the device, and with a longest segment that is known."""
    (query, segments, chunk), _ = inputs((1, 8, [300, 20], 20, 40, 64), {}, torch.float16)
    first = column_scores(query, segments, chunk, backend="triton")
    there = replace(segments, starts=segments.starts.to(DEVICE), lengths=segments.lengths.to(DEVICE))
    for tables, longest in ((segments, None), (there, None), (there, 300)):
        assert torch.equal(column_scores(query, tables, chunk, longest=longest, backend="triton"), first)


@needs_triton
def test_triton_empty_shapes():
    """An arena without rows beside a chunk, as a prompt finds it; no queries; no columns."""
    query, segments = torch.randn(1, 2, 3, 8).to(DEVICE), of_keys(torch.empty(0, 8, device=DEVICE), [0], [0])
    check(query, segments, Chunk(*torch.randn(2, 1, 1, 3, 8).to(DEVICE)), "triton")
    assert column_scores(query, segments, backend="triton").shape == (1, 1, 0)
    none = column_scores(query[:, :, :0], segments, Chunk(query[:, :1], query[:, :1]), backend="triton")
    assert torch.equal(none.cpu(), torch.zeros(1, 1, 3))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_triton_beyond_two_to_the_31_elements():
    """The segment, and the chunk's second token, lie more than 2 ** 31 elements behind the pointer."""
    dim, rows, length = 128, 2**24 + 400, 300
    keys = torch.full((rows, dim), NAN, dtype=torch.float16, device=DEVICE)
    keys[-length:] = torch.randn(length, dim)
    key = keys[:: 2**24 + 50][None, None]
    key[0, 0] = torch.randn(2, dim)
    query = torch.randn(1, 4, 2, dim, dtype=torch.float16, device=DEVICE)
    far = Segments(keys, keys, torch.tensor([rows - length]), torch.tensor([length]))
    out = column_scores(query, far, Chunk(key, key), backend="triton")
    near, chunk = of_keys(keys[-length:].clone(), [0], [length]), Chunk(key.contiguous(), key)
    assert torch.equal(out, column_scores(query, near, chunk, backend="triton"))
    check(query, near, chunk, "triton")


@needs_triton
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": torch.tensor([9])}, "segment 0 of 9 rows from row 0 leaves the arena of 8 rows"),
        ({"key": torch.zeros(1, 1, 2, 8, dtype=torch.float16)}, "got torch.float16, torch.float32"),
        ({"query": torch.zeros(1, 1, 2, 512), "keys": torch.zeros(8, 512)}, "head dim 512 is above 256"),
        ({"reduction": "max"}, "reduction='max'"),
    ],
    ids=["segment", "dtypes", "head dim", "reduction"],
)
def test_triton_refuses(change, message):
    given = {
        "query": torch.zeros(1, 1, 2, 8),
        "keys": torch.zeros(8, 8),
        "lengths": torch.tensor([8]),
        "key": None,
        "reduction": "sum",
    } | change
    given = {n: x.to(DEVICE) if torch.is_tensor(x) and x.is_floating_point() else x for n, x in given.items()}
    segments = Segments(given["keys"], given["keys"], torch.tensor([0]), given["lengths"])
    chunk = None if given["key"] is None else Chunk(given["key"], given["key"])
    with pytest.raises(ValueError, match=message):
        column_scores(given["query"], segments, chunk, reduction=given["reduction"], backend="triton")


def test_hand_written_answer():
    """Zero scores share a query's mass evenly: over two entries and one token, then over two entries and two tokens."""
    zeros, keys = torch.zeros(1, 1, 2, 4, device=DEVICE), torch.zeros(2, 4, device=DEVICE)
    out = column_scores(zeros, of_keys(keys, [0], [2]), Chunk(zeros, zeros))
    torch.testing.assert_close(out.flatten().cpu(), torch.tensor([7 / 12, 7 / 12, 7 / 12, 1 / 4]))


def test_hand_written_squares():
    """As above: two queries, thirds, then quarters."""
    zeros, keys = torch.zeros(1, 1, 2, 4, device=DEVICE), torch.zeros(2, 4, device=DEVICE)
    out = column_scores(zeros, of_keys(keys, [0], [2]), Chunk(zeros, zeros), power=2)
    torch.testing.assert_close(out.flatten().cpu(), torch.tensor([25 / 144, 25 / 144, 25 / 144, 1 / 16]))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "keys",
            torch.zeros(9, 5),
            r"column_scores: query \[2, 4, 3, 8\] needs keys \[R, 8\] with contiguous rows, got \[9, 5\]",
        ),
        ("starts", torch.tensor([0, 4, 6]), r"column_scores: starts and lengths must be .* got \[3\] and \[2\]"),
        ("lengths", torch.tensor([3, 9]), "segment 1 of 9 rows from row 4 leaves the arena of 9 rows"),
        ("sink_logits", torch.zeros(2), r"expected sink_logits \[4\], got \[2\]"),
        ("key", torch.zeros(2, 2, 3, 8), r"column_scores: expected the chunk's key .* got \[2, 2, 3, 8\]"),
        ("mask", torch.ones(1, 1, 2, 3).bool(), r"the chunk's mask \[1 or 2, 1, 3, 3\], got \[1, 1, 2, 3\]"),
        ("reduction", "mean", "column_scores: expected reduction 'sum' or 'max', got 'mean'"),
        ("query_mask", torch.ones(1, 3).bool(), r"expected query_mask \[2, 3\], got \[1, 3\]"),
        ("power", 0, "column_scores: expected a finite power above 0, got 0"),
        ("power", NAN, "column_scores: expected a finite power above 0, got nan"),
        ("longest", 5, "column_scores: longest is 5, but the longest segment has 4 entries"),
    ],
)
def test_what_does_not_fit_is_refused(name, value, message):
    segments = Segments(torch.zeros(9, 8), torch.zeros(9, 8), torch.tensor([0, 4]), torch.tensor([3, 4]))
    chunk, kwargs = Chunk(torch.zeros(2, 1, 3, 8), torch.zeros(2, 1, 3, 8)), {}
    if hasattr(segments, name):
        segments = replace(segments, **{name: value})
    elif hasattr(chunk, name):
        chunk = replace(chunk, **{name: value})
    else:
        kwargs[name] = value
    with pytest.raises(ValueError, match=message):
        column_scores(torch.zeros(2, 4, 3, 8), segments, chunk, **kwargs)
