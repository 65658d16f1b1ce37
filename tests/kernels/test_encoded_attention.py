"""Attention over codes: the torch path decodes, the kernels must give the same."""

import os
from dataclasses import replace

import pytest
import torch
from kvpolicy_kernels.attention import plan_work
from kvpolicy_kernels.encoded_attention import encoded_attention
from kvpolicy_kernels.formats import INT4, INT8, Encoded, EntryFormat
from kvpolicy_kernels.segments import Chunk, EncodedSegments, ExactCopies

from tests.kernels.segments import DEVICE, VARIANTS, arena, key_centre, options, oracle

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(not (INTERPRET or DEVICE == "cuda"), reason="needs a GPU or TRITON_INTERPRET=1")
backends = pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
CODED = [INT8, INT4, EntryFormat(4), EntryFormat(8, rotated=True)]
formats = pytest.mark.parametrize("entry_format", CODED, ids=str)


def encoded(lengths, dim, value_dim, entry_format):
    """Segments in an arena whose other rows hold codes of anything, and NaN for step and zero."""
    rows = arena(lengths, dim, value_dim)
    garbage = rows.keys.isnan().any(1)
    columns = []
    for column in (rows.keys, rows.values):
        codes, scales = entry_format.encode(column.nan_to_num(0.0) * 3 + 0.5)
        codes[garbage] = torch.randint_like(codes[garbage], -(2**15), 2**15 - 1)
        columns.append(Encoded(codes, scales.masked_fill(garbage[:, None], float("nan"))))
    return EncodedSegments(*columns, rows.starts, rows.lengths, entry_format)


def check(backend, query, segments, chunk=None, tolerance=2e-5, num_programs=7, counted=None, **kwargs):
    """Attention, log-sum-exps and mass; with few programs, so that segments are cut and programs hold several.

    counted: the entries as they count, where that is not as they are decoded
    """
    if backend == "triton":
        kwargs["plan"] = plan_work(
            segments.lengths.to(DEVICE), head_dim=query.shape[-1], num_programs=num_programs, backend="triton"
        )
    found = encoded_attention(query, segments, chunk, backend=backend, with_lse=True, with_mass=True, **kwargs)
    kwargs = {name: x for name, x in kwargs.items() if name not in ("plan", "copies")}
    counted = segments.decoded(torch.float32) if counted is None else counted
    expected = oracle(query, counted, chunk, **kwargs)
    assert found.out.dtype == query.dtype
    for name, got, right in zip(found._fields, found, expected, strict=True):
        same = got.double() == right  # -inf in both
        error = (got.double() - right).abs().masked_fill(same, 0.0).max()
        assert error <= tolerance * (1 + float(right.masked_fill(same, 0.0).abs().max())), f"{name}: {error:.2e}"


# batch, query heads, lengths of the segments, queries, head dim, value dim
CASES = [
    (1, 3, [5, 5, 5], 1, 16, 16),
    (2, 14, [127, 128, 129, 1], 1, 64, 64),
    (2, 10, [300, 0], 1, 80, 80),
    (1, 4, [3, 160], 9, 32, 48),
    (1, 2, [0, 0], 1, 16, 16),
]


def inputs(case, entry_format):
    batch, num_q_heads, lengths, n, dim, value_dim = case
    query = torch.randn(batch, num_q_heads, n, dim, device=DEVICE)
    return query, encoded(lengths, dim, value_dim, entry_format)


@formats
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch(case, variant, entry_format):
    check("torch", *inputs(case, entry_format), **options(variant, case[1]))


@needs_triton
@pytest.mark.parametrize("case", CASES, ids=str)
def test_triton(case, poisoned):
    check("triton", *inputs(case, INT8 if case is CASES[1] else INT4))


@needs_triton
@formats
@pytest.mark.parametrize("variant", VARIANTS[3:], ids=str)
def test_triton_variants(variant, entry_format, poisoned):
    check("triton", *inputs(CASES[0], entry_format), **options(variant, 3))


@pytest.mark.parametrize("entry_format", CODED[:2], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("lengths", "n", "m"), [([0, 206], 4, 7), ([300, 0], 1, 37)], ids=str)
@backends
def test_chunk(backend, lengths, n, m, masked, entry_format, poisoned):
    """The causal rule, and an exact block: slots that are not filled yet, and under which the first query sees none."""
    query = torch.randn(1, 6, n, 32, device=DEVICE)
    key, value = (torch.randn(1, 2, m, dim, device=DEVICE) for dim in (32, 16))
    mask = torch.rand(1, 1, n, m, device=DEVICE) < 0.5 if masked else None
    if masked:
        mask[:, :, 0] = False
    segments = encoded(lengths, 32, 16, entry_format)
    extra = {"softcap": 5.0, "sink_logits": torch.zeros(6, device=DEVICE)} if n == 4 else {}
    check(backend, query, segments, Chunk(key, value, mask), **extra)


def copies_of(segments, batch, num_sinks, recent, seen, dims):
    """Segments with positions, exact copies of the sinks and of the last tokens, whose codes are nonsense, and the
    entries as they count.

    seen: tokens of each sequence. Segments hold the sinks, as many of the last tokens as there are, and any others.
    """
    heads, rows = len(segments) // batch, len(segments.keys.codes)
    positions = torch.full((rows,), -1, dtype=torch.int32, device=DEVICE)
    slots, copied = torch.full((batch, num_sinks + recent), -1, dtype=torch.int32, device=DEVICE), []
    key, value = (torch.randn(batch, heads, num_sinks + recent, dim, device=DEVICE) for dim in dims)
    for i, (start, length) in enumerate(zip(segments.starts.tolist(), segments.lengths.tolist(), strict=True)):
        b, h = divmod(i, heads)
        first, last = range(min(num_sinks, seen[b])), range(max(num_sinks, seen[b] - recent), seen[b])
        others = range(num_sinks, max(num_sinks, seen[b] - recent))
        places = [*first, *last, *others[: length - len(first) - len(last)]]
        assert len(places) == length
        order = torch.randperm(length)
        own = torch.tensor(places, dtype=torch.int32)[order]
        positions[start : start + length] = own.to(DEVICE)
        for p in (*first, *last):
            slot = p if p < num_sinks else num_sinks + p % recent
            slots[b, slot] = p
            copied.append((start + int((own == p).nonzero()), (b, h, slot)))
    segments = replace(segments, positions=positions)
    counted = segments.decoded(torch.float32)
    for row, place in copied:
        counted.keys[row], counted.values[row] = key[place], value[place]
    return segments, ExactCopies(key, value, slots, num_sinks), counted


@pytest.mark.parametrize("entry_format", CODED[:2], ids=str)
@pytest.mark.parametrize(
    ("lengths", "seen", "num_sinks", "n", "dims"),
    [
        ([150, 9, 70, 12], [300, 200], 4, 1, (32, 16)),
        ([9, 9, 100, 200], [90, 400], 0, 1, (80, 80)),
        ([3, 3, 7, 7], [3, 7], 4, 1, (16, 16)),
        ([140, 30, 12, 20], [150, 30], 2, 3, (16, 32)),
    ],
    ids=str,
)
@backends
def test_exact_copies(backend, lengths, seen, num_sinks, n, dims, entry_format, poisoned):
    """Hidden codes, in every tile or in all of one, a ring that is not full, and sinks that have not all come."""
    recent = 9
    lengths = [max(x, min(seen[i // 2], num_sinks + recent)) for i, x in enumerate(lengths)]
    segments = encoded(lengths, *dims, entry_format)
    segments, copies, counted = copies_of(segments, 2, num_sinks, recent, seen, dims)
    query = torch.randn(2, 6, n, dims[0], device=DEVICE)
    extra = {"softcap": 3.0, "sink_logits": torch.zeros(6, device=DEVICE)} if n == 3 else {}
    check(backend, query, segments, copies=copies, counted=counted, **extra)


@pytest.mark.parametrize("entry_format", CODED[:2], ids=str)
@pytest.mark.parametrize(("n", "masked"), [(1, True), (3, True), (3, False)])
@backends
def test_copies_and_a_chunk(backend, n, masked, entry_format, poisoned):
    """A ring that is not full, and a block of which some columns are free, which count for nothing."""
    segments = encoded([150, 13, 9, 9], 32, 16, entry_format)
    segments, copies, counted = copies_of(segments, 2, 4, 9, [300, 9], (32, 16))
    query = torch.randn(2, 6, n, 32, device=DEVICE)
    key, value = (torch.randn(2, 2, 8, dim, device=DEVICE) for dim in (32, 16))
    mask = None
    if masked:
        mask = torch.rand(2, 1, n, 8, device=DEVICE) < 0.5
        mask[..., 5:] = False
        key[:, :, 5:], value[:, :, 5:] = 10.0, 10.0
    free = (copies.positions < 0)[:, None, :, None]
    copies = replace(copies, key=copies.key.masked_fill(free, 10.0))
    check(backend, query, segments, Chunk(key, value, mask), copies=copies, counted=counted)
    check(backend, query, segments, Chunk(key, value, mask), copies=copies, counted=counted, softcap=5.0,
          sink_logits=torch.ones(6, device=DEVICE))  # fmt: skip


@pytest.mark.parametrize("entry_format", CODED[:2], ids=str)
@pytest.mark.parametrize(("beside", "pairs"), [("nothing", 3), ("copies", 4), ("chunk", 1), ("nothing", 0)])
@backends
def test_key_centre(backend, beside, entry_format, pairs, poisoned):
    """Scores are those of whole keys: beside exact ones, under a softcap, beside a sink; tokens of any position."""
    segments = encoded([150, 13, 40, 90], 32, 16, entry_format)
    positions = torch.randint(2**20, (len(segments.keys.codes),), dtype=torch.int32, device=DEVICE)
    segments = replace(segments, positions=positions, key_centre=key_centre(2, 32, pairs=pairs))
    query, extra, counted = torch.randn(2, 6, 1, 32, device=DEVICE), {}, None
    if beside == "copies":
        segments, extra["copies"], counted = copies_of(segments, 2, 4, 9, [300, 200], (32, 16))
    if beside == "chunk":
        extra["chunk"] = Chunk(*(torch.randn(2, 2, 5, dim, device=DEVICE) for dim in (32, 16)))
    check(backend, query, segments, counted=counted, **extra)
    check(backend, query, segments, counted=counted, softcap=5.0, sink_logits=torch.ones(6, device=DEVICE), **extra)


@backends
def test_mass_of_a_power_of_copies(backend):
    segments = encoded([40, 13], 16, 16, INT4)
    segments, copies, _ = copies_of(segments, 1, 2, 5, [60], (16, 16))
    query = torch.randn(1, 2, 1, 16, device=DEVICE)
    plain, squares = (
        encoded_attention(query, segments, copies=copies, with_mass=True, mass_power=x, backend=backend).mass
        for x in (1.0, 2.0)
    )
    torch.testing.assert_close(squares, plain.square(), atol=1e-6, rtol=1e-5)


@backends
def test_mass_of_a_power(backend):
    """Of one query head each, the square of the mass."""
    query, segments = torch.randn(1, 2, 1, 16, device=DEVICE), encoded([40, 3], 16, 16, INT4)
    plain, squares = (
        encoded_attention(query, segments, with_mass=True, mass_power=x, backend=backend).mass for x in (1.0, 2.0)
    )
    torch.testing.assert_close(squares, plain.square(), atol=1e-6, rtol=1e-5)


@needs_triton
@pytest.mark.parametrize("num_programs", [1, 40])
def test_triton_any_number_of_programs(num_programs, poisoned):
    query = torch.randn(1, 6, 1, 16, device=DEVICE)
    check("triton", query, encoded([400, 0, 130], 16, 16, INT4), num_programs=num_programs)


@needs_triton
@pytest.mark.parametrize("entry_format", CODED[:2], ids=str)
def test_triton_columns_of_one_arena(entry_format, poisoned):
    """Rows of codes and scales that are further apart, queries and a chunk that are not contiguous."""
    segments = encoded([200, 5], 16, 16, entry_format)

    def apart(column):
        codes = torch.cat([column.codes, torch.zeros_like(column.codes)], 1)[:, : column.codes.shape[1]]
        return Encoded(codes, torch.cat([column.scales, column.scales], 1)[:, :2])

    segments = replace(segments, keys=apart(segments.keys), values=apart(segments.values))
    query = torch.randn(1, 3, 4, 16, device=DEVICE).transpose(1, 2)
    key, value = (torch.randn(1, 6, 2, 16, device=DEVICE).transpose(1, 2) for _ in range(2))
    check("triton", query, segments, Chunk(key, value, torch.rand(1, 1, 3, 6, device=DEVICE) < 0.7))


@needs_triton
@pytest.mark.parametrize("entry_format", CODED[:2], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("centred", [False, True])
def test_triton_16_bit(centred, dtype, entry_format, poisoned):
    """At most twice the error of the torch path against fp64 over the decoded entries."""
    if INTERPRET and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bf16 as integers")
    for dim, group, n in ((64, 3, 1),) if INTERPRET else ((64, 3, 1), (80, 7, 1), (128, 4, 2), (256, 8, 1)):
        segments = encoded([300 if INTERPRET else 1500, 130, 0, 128], dim, dim, entry_format)
        if centred:
            positions = torch.randint(2**17, (len(segments.keys.codes),), dtype=torch.int32, device=DEVICE)
            segments = replace(segments, positions=positions, key_centre=key_centre(2, dim, pairs=8, size=1.0))
        query = torch.randn(2, 2 * group, n, dim, device=DEVICE).to(dtype)
        chunk = Chunk(*(torch.randn(2, 2, 5, dim, device=DEVICE).to(dtype) for _ in range(2)))
        for arriving in (None, chunk):
            exact = oracle(query, segments.decoded(torch.float32), arriving)[0]
            plain, found = (
                encoded_attention(query, segments, arriving, backend=name).out.double() for name in ("torch", "triton")
            )
            error, allowed = (found - exact).abs().max(), (plain - exact).abs().max()
            assert error <= 2 * allowed, f"dim {dim}, group {group}: error {error:.2e}, torch {allowed:.2e}"


@needs_triton
@pytest.mark.parametrize("entry_format", CODED[:2], ids=str)
def test_triton_weights_of_every_size(entry_format):
    """Values that are tiny, and weights that differ by many orders: fp16 alone would lose them."""
    segments = encoded([300, 70], 64, 64, entry_format)
    small = Encoded(segments.values.codes, segments.values.scales * 2.0**-9)
    segments = replace(segments, values=small)
    query = 4 * torch.randn(1, 6, 1, 64, device=DEVICE).half()
    exact = oracle(query, segments.decoded(torch.float32))[0]
    plain, found = (encoded_attention(query, segments, backend=x).out.double() for x in ("torch", "triton"))
    assert (found - exact).abs().max() <= 2 * (plain - exact).abs().max()


def test_auto_is_the_backend_of_the_device():
    query, segments = torch.randn(1, 2, 1, 16, device=DEVICE), encoded([4, 5], 16, 16, INT4)
    own = "triton" if DEVICE == "cuda" else "torch"
    auto, expected = (encoded_attention(query, segments, backend=name).out for name in ("auto", own))
    assert torch.equal(auto, expected)


def test_what_does_not_fit_is_refused():
    query, segments = torch.randn(1, 2, 1, 32, device=DEVICE), encoded([4, 5], 32, 16, INT4)
    with pytest.raises(ValueError, match=r"expected codes of keys \[15, 4\] of torch.int16 .* got \[15, 8\]"):
        encoded_attention(query[..., :16], segments)
    with pytest.raises(ValueError, match=r"expected codes of keys \[15, 16\] of torch.int16 .* got \[15, 8\]"):
        encoded_attention(query, replace(segments, entry_format=INT8))
    short = Encoded(segments.values.codes, segments.values.scales[1:])
    with pytest.raises(ValueError, match=r"expected scales of values \[15, 2\] of torch.float16 .* got \[14, 2\]"):
        encoded_attention(query, replace(segments, values=short))
    with pytest.raises(ValueError, match="entries of 16 bits are not encoded"):
        encoded_attention(query, replace(segments, entry_format=EntryFormat(16)))
    with pytest.raises(ValueError, match="leaves the arena"):
        encoded_attention(query, replace(segments, starts=segments.starts + 20))
    with pytest.raises(ValueError, match=r"need a plan whose pieces are \[2, 2\], got \[3, 2\]"):
        encoded_attention(query, segments, plan=plan_work(torch.tensor([1, 2, 3])))
    with pytest.raises(ValueError, match=r"expected a key_centre of shape \(2, 32\), got \(2, 16\)"):
        encoded_attention(query, replace(segments, key_centre=key_centre(2, 16)))
    with pytest.raises(ValueError, match=r"need the positions of the entries, int32 \[15\], got none"):
        encoded_attention(query, replace(segments, key_centre=key_centre(2, 32)))
    segments, copies, _ = copies_of(segments, 1, 1, 2, [9], (32, 16))
    with pytest.raises(ValueError, match=r"expected copies .* with less than 3 sinks, got .* with 3"):
        encoded_attention(query, segments, copies=replace(copies, num_sinks=3))
    with pytest.raises(ValueError, match=r"starts and lengths must be \[1 \* num_kv_heads\]"):
        encoded_attention(torch.randn(1, 3, 1, 32, device=DEVICE), segments)


@needs_triton
@pytest.mark.parametrize("wanted", ["with_lse", "with_mass"])
def test_triton_refuses_the_mass_of_many_queries(wanted):
    segments = encoded([4, 5], 16, 16, INT4)
    with pytest.raises(ValueError, match="cannot do this: 17 queries of 1 heads a group, where 16 queries"):
        query = torch.zeros(1, 2, 17, 16, device=DEVICE)
        encoded_attention(query, segments, backend="triton", **{wanted: True})


@needs_triton
def test_triton_refuses_other_dtypes():
    segments = encoded([4, 5], 16, 16, INT4)
    with pytest.raises(ValueError, match=r"cannot do this: queries and a chunk of torch.float64"):
        encoded_attention(torch.zeros(1, 2, 1, 16, device=DEVICE).double(), segments, backend="triton")
