"""Column scores over codes: the torch path decodes, the kernels must give the same."""

import os
from dataclasses import replace

import pytest
import torch
from kvpolicy_kernels.column_scores import column_scores
from kvpolicy_kernels.formats import INT4, INT8, Encoded
from kvpolicy_kernels.segments import Chunk

from tests.kernels.segments import DEVICE, key_centre
from tests.kernels.test_column_scores import oracle
from tests.kernels.test_encoded_attention import CODED, copies_of, encoded

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(not (INTERPRET or DEVICE == "cuda"), reason="needs a GPU or TRITON_INTERPRET=1")
nan_queries = pytest.mark.filterwarnings("ignore:All-NaN slice")  # the interpreter's maximum of such a row
formats = pytest.mark.parametrize("entry_format", [INT8, INT4], ids=str)
NAN = float("nan")
# batch, query heads, lengths of the segments, queries, tokens of the chunk, head dim
CASES = [
    (1, 6, [5, 0], 4, 7, 16),
    (2, 14, [70, 0, 129, 64], 5, 5, 32),
    (1, 3, [128, 65, 127], 40, 70, 80),
    (1, 2, [200, 3], 33, None, 64),
    (1, 1, [0], 3, 4, 16),
]
VARIANTS = [{}, {"softcap": 2.0}, {"sinks": True}, {"power": 2.0, "sinks": True}, {"scale": 0.6, "softcap": 3.0}]


def inputs(case, entry_format, variant=None, dtype=torch.float32):
    """Values are NaN, and nobody looks at them."""
    batch, num_q_heads, lengths, n, m, dim = case
    torch.manual_seed(sum(lengths) + n)
    segments = encoded(lengths, dim, 16, entry_format)
    nothing = torch.full_like(segments.values.scales, NAN)
    segments = replace(segments, values=Encoded(segments.values.codes, nothing))
    kwargs = {name: x for name, x in (variant or {}).items() if name != "sinks"}
    if variant and "sinks" in variant:
        kwargs["sink_logits"] = torch.linspace(-1, 2, num_q_heads, device=DEVICE)
    chunk = None
    if m is not None:
        key = torch.randn(batch, len(lengths) // batch, m, dim).to(DEVICE, dtype)
        chunk = Chunk(key, key.new_full((*key.shape[:3], 16), NAN))
    return (torch.randn(batch, num_q_heads, n, dim).to(DEVICE, dtype), segments, chunk), kwargs


def check(backend, query, segments, chunk=None, copies=None, **kwargs):
    """The error is at most twice torch's, which decodes, and nothing stands where nothing belongs."""
    out, plain = (
        column_scores(query, segments, chunk, copies=copies, backend=name, **kwargs).cpu()
        for name in (backend, "torch")
    )
    exact = oracle(query, segments.decoded(torch.float32, copies), chunk, **kwargs)
    assert out.dtype == torch.float32
    assert (out[exact == 0] == 0).all(), "an absent or invisible column got mass"
    error, allowed = (float((x.double() - exact).abs().max()) if x.numel() else 0.0 for x in (out, plain))
    least = 1e-5 if query.dtype == torch.float32 else 1e-6  # of a sum of many weights, or of a few near 1
    assert error <= max(2 * allowed, least * (1 + float(exact.max()))), f"error {error:.2e}, torch {allowed:.2e}"


def skip_what_the_interpreter_cannot(dtype):
    if INTERPRET and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bf16 as integers")


@formats
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_torch(case, variant, entry_format):
    arguments, kwargs = inputs(case, entry_format, variant)
    check("torch", *arguments, **kwargs)


@needs_triton
@formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_triton(case, dtype, entry_format, poisoned):
    skip_what_the_interpreter_cannot(dtype)
    arguments, _ = inputs(case, entry_format, dtype=dtype)
    check("triton", *arguments)


@needs_triton
@pytest.mark.parametrize("entry_format", CODED[2:], ids=str)
def test_triton_other_formats(entry_format, poisoned):
    check("triton", *inputs(CASES[1], entry_format)[0])


@needs_triton
@formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS[1:], ids=str)
def test_triton_variants(variant, dtype, entry_format, poisoned):
    arguments, kwargs = inputs(CASES[1], entry_format, variant, dtype)
    check("triton", *arguments, **kwargs)


@needs_triton
@nan_queries
@formats
@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_triton_masks(case, entry_format, poisoned):
    """Padding queries are NaN, as from padding tokens, and the first query sees none of the chunk."""
    batch, _, _, n, m, _ = case
    (query, segments, chunk), _ = inputs(case, entry_format)
    mask = torch.rand(batch, 1, n, m) < 0.5
    mask[:, :, 0] = False
    counts = torch.rand(batch, n) < 0.5
    query[~counts.to(DEVICE)[:, None].expand(query.shape[:3])] = NAN
    check("triton", query, segments, replace(chunk, mask=mask.to(DEVICE)), query_mask=counts.to(DEVICE))


def copied(entry_format, lengths, seen, num_sinks=4, dims=(32, 16), dtype=torch.float32):
    """Two sequences of two heads, with copies of the sinks and of the last nine tokens."""
    lengths = [max(x, min(seen[i // 2], num_sinks + 9)) for i, x in enumerate(lengths)]
    segments, copies, _ = copies_of(encoded(lengths, *dims, entry_format), 2, num_sinks, 9, seen, dims)
    return segments, replace(copies, key=copies.key.to(dtype), value=copies.value.to(dtype))


@formats
@pytest.mark.parametrize("pairs", [None, 0, 3])
@pytest.mark.parametrize(
    ("lengths", "seen", "num_sinks"),
    [
        ([150, 13, 70, 13], [300, 200], 4),
        pytest.param([9, 9, 100, 200], [90, 400], 0, marks=pytest.mark.slow),
        ([9, 9, 40, 70], [90, 140], 0),
        ([3, 3, 7, 7], [3, 7], 4),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
def test_copies(backend, lengths, seen, num_sinks, pairs, entry_format, poisoned):
    """Copies of nonsense codes: a ring that is not full, and sinks that have not all come; a chunk, and none.

    pairs: of the keys' centre, None for none
    """
    segments, copies = copied(entry_format, lengths, seen, num_sinks)
    if pairs is not None:
        segments = replace(segments, key_centre=key_centre(2, 32, pairs=pairs, size=2.0))
    free = (copies.positions < 0)[:, None, :, None]
    copies = replace(copies, key=copies.key.masked_fill(free, 10.0))
    query, key = torch.randn(2, 6, 5, 32, device=DEVICE), torch.randn(2, 2, 8, 32, device=DEVICE)
    chunk = Chunk(key, key[..., :16])
    for extra in ({}, {"softcap": 3.0, "power": 2.0, "sink_logits": torch.ones(6, device=DEVICE)}):
        check(backend, query, segments, chunk, copies, **extra)
        check(backend, query, segments, None, copies, **extra)


@needs_triton
@nan_queries
@formats
def test_triton_copies_and_padding(entry_format, poisoned):
    segments, copies = copied(entry_format, [150, 13, 70, 13], [300, 200])
    query, key = torch.randn(2, 6, 5, 32, device=DEVICE), torch.randn(2, 2, 8, 32, device=DEVICE)
    counts = torch.tensor([[False, False, True, True, True], [True] * 5])
    mask = torch.ones(2, 1, 5, 8).tril(3).bool()
    mask[0, :, :, :5], mask[0, :, :2] = False, False
    query[0, :, :2] = NAN
    chunk = Chunk(key, key[..., :16], mask.to(DEVICE))
    check("triton", query, segments, chunk, copies, query_mask=counts.to(DEVICE))


@needs_triton
@formats
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_triton_16_bit(dtype, centred, entry_format, poisoned):
    skip_what_the_interpreter_cannot(dtype)
    for dim in (64,) if INTERPRET else (64, 80, 128, 256) if dtype == torch.bfloat16 else (128,):
        lengths = [200 if INTERPRET else 600, 130, 13, 128]
        segments, copies = copied(entry_format, lengths, [700, 300], dims=(dim, 16), dtype=dtype)
        if centred:
            segments = replace(segments, key_centre=key_centre(2, dim, pairs=8, size=1.0))
        query = torch.randn(2, 14, 10, dim, device=DEVICE).to(dtype)
        key = torch.randn(2, 2, 33, dim, device=DEVICE).to(dtype)
        check("triton", query, segments, Chunk(key, key[..., :16]), copies)
        check("triton", query, segments, Chunk(key, key[..., :16]))


@needs_triton
@pytest.mark.parametrize("programs", [1, 5, 528])
def test_triton_any_number_of_programs(programs, poisoned, monkeypatch):
    """One walk over all codes, and the walk in parts."""
    from kvpolicy_kernels.column_scores import kernel

    monkeypatch.setattr(kernel, "PROGRAMS", programs)
    segments, copies = copied(INT4, [200, 13, 70, 13], [400, 200])
    key = torch.randn(2, 2, 40, 32, device=DEVICE)
    check("triton", torch.randn(2, 6, 25, 32, device=DEVICE), segments, Chunk(key, key[..., :16]), copies)


@needs_triton
@formats
def test_triton_columns_of_one_arena(entry_format, poisoned):
    """Rows of codes and scales that are further apart, queries and a chunk that are not contiguous."""
    (query, segments, chunk), _ = inputs((1, 6, [200, 5], 4, 9, 16), entry_format)
    expected = column_scores(query, segments, chunk, backend="triton")
    codes, scales = segments.keys
    wide = torch.cat([codes, torch.zeros_like(codes)], 1)[:, : codes.shape[1]]
    segments = replace(segments, keys=Encoded(wide, torch.cat([scales, scales], 1)[:, :2]))

    def apart(x):
        return torch.stack([x, x], -1)[..., 0]

    found = column_scores(apart(query), segments, Chunk(apart(chunk.key), chunk.value), backend="triton")
    assert torch.equal(found, expected)


@needs_triton
@formats
def test_triton_gives_equal_bits(entry_format, poisoned):
    """Twice, from tables on the device, and with a longest segment that is known."""
    segments, copies = copied(entry_format, [150, 13, 70, 13], [300, 200], dtype=torch.float16)
    query, key = (torch.randn(2, x, 20, 32, device=DEVICE).half() for x in (6, 2))
    chunk = Chunk(key, key[..., :16])
    first = column_scores(query, segments, chunk, copies=copies, backend="triton")
    there = segments.on(torch.device(DEVICE))
    for tables, longest in ((segments, None), (there, None), (there, 150)):
        again = column_scores(query, tables, chunk, copies=copies, longest=longest, backend="triton")
        assert torch.equal(again, first)


@needs_triton
@formats
def test_triton_empty_shapes(entry_format):
    """An arena without rows beside a chunk, as a prompt finds it; no queries; no columns."""
    rows = [Encoded(*(x.to(DEVICE) for x in entry_format.encode(torch.zeros(0, 16)))) for _ in range(2)]
    (query, segments, chunk), _ = inputs((1, 2, [0], 3, 3, 16), entry_format)
    segments = replace(segments, keys=rows[0], values=rows[1], starts=torch.tensor([0]))
    check("triton", query, segments, chunk)
    assert column_scores(query, segments, backend="triton").shape == (1, 1, 0)
    none = column_scores(query[:, :, :0], segments, chunk, backend="triton")
    assert torch.equal(none.cpu(), torch.zeros(1, 1, 3))


@formats
def test_the_largest_weight_is_that_over_decoded_entries(entry_format):
    segments, copies = copied(entry_format, [30, 13, 20, 13], [60, 40])
    query, key = (torch.randn(2, x, 6, 32, device=DEVICE) for x in (6, 2))
    chunk = Chunk(key, key[..., :16])
    found = column_scores(query, segments, chunk, copies=copies, reduction="max")
    decoded = segments.decoded(torch.float32, copies)
    assert torch.equal(found, column_scores(query, decoded, chunk, reduction="max"))


def test_what_does_not_fit_is_refused():
    segments, copies = copied(INT4, [9, 9, 9, 9], [9, 9])
    query = torch.zeros(2, 2, 3, 32, device=DEVICE)
    with pytest.raises(ValueError, match=r"column_scores: expected codes of keys \[46, 4\] of torch.int16"):
        column_scores(query[..., :16], segments)
    with pytest.raises(ValueError, match=r"column_scores: copies and a key_centre need the positions .* got none"):
        column_scores(query, replace(segments, positions=None), copies=copies)
    with pytest.raises(ValueError, match=r"column_scores: expected copies .* with less than 13 sinks, got .* with 13"):
        column_scores(query, segments, copies=replace(copies, num_sinks=13))
    with pytest.raises(ValueError, match="leaves the arena"):
        column_scores(query, replace(segments, starts=segments.starts + 40))
    with pytest.raises(ValueError, match="column_scores: exact copies belong to entries that are encoded"):
        column_scores(query, segments.decoded(torch.float32), copies=copies)


@needs_triton
def test_triton_refuses_keys_of_two_types():
    segments, copies = copied(INT4, [9, 9, 9, 9], [9, 9], dtype=torch.float16)
    with pytest.raises(ValueError, match=r"cannot do this: .* got torch.float16, torch.float32"):
        column_scores(torch.zeros(2, 2, 3, 32, device=DEVICE), segments, copies=copies, backend="triton")
