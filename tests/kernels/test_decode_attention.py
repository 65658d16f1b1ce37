import os
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kvpolicy_kernels.attention import decode_attention, plan_work, ragged_attention
from kvpolicy_kernels.attention.plan import reference_plan, unit_of
from kvpolicy_kernels.segments import Chunk, Segments

from tests.kernels.segments import DEVICE, VARIANTS, arena, chunked, in_blocks, interleaved, options, oracle

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(not (INTERPRET or DEVICE == "cuda"), reason="needs a GPU or TRITON_INTERPRET=1")


def check(backend, query, segments, chunk=None, tolerance=1e-5, num_programs=7, head_dim=None, **kwargs):
    """Attention, log-sum-exps and mass; with few programs, so that segments are cut and programs hold several."""
    if backend == "triton":
        dim = head_dim or max(segments.keys.shape[1], segments.values.shape[1])
        kwargs["plan"] = plan_work(
            segments.lengths.to(DEVICE), head_dim=dim, num_programs=num_programs, backend="triton"
        )
    found = decode_attention(query, segments, chunk, backend=backend, with_lse=True, with_mass=True, **kwargs)
    kwargs.pop("plan", None)
    expected = oracle(query, segments, chunk, **kwargs)
    assert found.out.dtype == query.dtype
    assert found.lse.dtype == found.mass.dtype == torch.float32
    for name, got, right in zip(found._fields, found, expected, strict=True):
        same = got.double() == right  # -inf in both
        error = (got.double() - right).abs().masked_fill(same, 0.0).max()
        scale = (
            max(1.0, float(query.shape[2] * query.shape[1] / (len(segments) // len(query)))) if name == "mass" else 1
        )
        assert error <= tolerance * scale, f"{name}: error {error:.2e}"


# batch, query heads, lengths of the segments, queries, head dim, value dim
CASES = [
    (1, 3, [5, 5, 5], 1, 16, 16),
    (1, 9, [300, 0, 1], 1, 16, 24),
    (2, 14, [127, 128, 129, 1], 1, 64, 64),
    (2, 10, [700, 0], 1, 80, 80),
    (1, 16, [400], 1, 16, 16),
    (1, 1, [384], 1, 96, 96),
    (1, 2, [0, 0], 1, 16, 16),
    (1, 4, [3, 260], 9, 16, 8),
    (1, 8, [130], 16, 16, 16),
    (3, 6, [1] * 6, 2, 16, 16),
]


def inputs(case, dtype=torch.float32):
    batch, num_q_heads, lengths, n, dim, value_dim = case
    query = torch.randn(batch, num_q_heads, n, dim, device=DEVICE).to(dtype)
    return query, arena(lengths, dim, value_dim, dtype)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch(case, variant):
    check("torch", *inputs(case), **options(variant, case[1]))


@needs_triton
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_triton(case, variant, poisoned):
    check("triton", *inputs(case), **options(variant, case[1]))


# batch, query heads, lengths of the segments, queries, tokens of the chunk, value dim
CHUNKS = [
    (1, 2, [0], 9, 9, 8),
    (1, 3, [9], 1, 1, 8),
    (2, 2, [0, 206], 4, 7, 8),
    (1, 2, [3, 0], 9, 2, 8),
    (1, 3, [300, 0, 1], 5, 140, 12),
    (2, 6, [0, 1, 4, 3], 3, 0, 8),
]


@pytest.mark.parametrize("variant", VARIANTS[::2], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", CHUNKS, ids=str)
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
def test_chunk(backend, case, masked, variant, poisoned):
    """The causal rule, and a random mask under which the first query sees no token of the chunk."""
    batch, num_q_heads, _, n, m, _ = case
    query, segments, chunk = chunked(*case)
    if masked:
        mask = (torch.rand(batch, 1, n, m) < 0.5).to(DEVICE)
        mask[:, :, 0] = False
        chunk = replace(chunk, mask=mask)
    check(backend, query, segments, chunk, **options(variant, num_q_heads))


@pytest.mark.parametrize("variant", VARIANTS[::2], ids=str)
@pytest.mark.parametrize("case", CHUNKS, ids=str)
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
def test_keys_and_values_of_one_arena(backend, case, variant, poisoned):
    """Rows that are longer than a key or a value; without a chunk, and with one."""
    query, segments, chunk = chunked(*case)
    for arriving in (None, chunk):
        check(backend, query, interleaved(segments), arriving, **options(variant, case[1]))


# lengths of the segments, and the entries of each KV head in a block
BLOCKS = [([300, 7, 40, 0, 0, 0], [40, 1, 13]), ([200, 131], [70, 64]), ([64, 0, 65, 129], [3])]


@pytest.mark.parametrize("variant", VARIANTS[-1:], ids=str)
@pytest.mark.parametrize(("lengths", "sizes"), BLOCKS, ids=str)
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
def test_entries_in_blocks(backend, lengths, sizes, variant, poisoned):
    """Few programs, so that pieces begin inside of blocks; plans for these lengths, and for other ones."""
    segments, batch = in_blocks(lengths, sizes, 16), len(lengths) // len(sizes)
    query = torch.randn(batch, 3 * len(sizes), 1, 16, device=DEVICE)
    chunk = Chunk(*(torch.randn(batch, len(sizes), 1, 16, device=DEVICE) for _ in range(2)))
    kwargs = options(variant, 3 * len(sizes))
    plans = [None, plan_work(torch.full((len(lengths),), 90, device=DEVICE), num_programs=3)]
    for new, plan in ((None, plans[0]), (chunk, plans[0]), (None, plans[1])):
        found = decode_attention(query, segments, new, plan=plan, with_lse=True, backend=backend, **kwargs)
        expected = oracle(query, segments.gathered(), new, **kwargs)
        torch.testing.assert_close(found.out.double(), expected[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(found.lse.double(), expected[1].to(found.lse.device), atol=1e-5, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_entries_in_blocks_on_a_gpu(dtype):
    """At most twice the error of the torch path in the same dtype, at sizes of a model's."""
    segments = in_blocks([700, 90, 2000, 250] * 2, [70, 9, 200, 25], 128, dtype)
    query = torch.randn(2, 16, 1, 128, device="cuda").to(dtype)
    exact = oracle(query, segments.gathered())[0]
    plain, found = (decode_attention(query, segments, backend=name).out.double() for name in ("torch", "triton"))
    assert (found - exact).abs().max() <= 2 * (plain - exact).abs().max()


@needs_triton
@pytest.mark.parametrize("shared", [False, True])
def test_triton_strides(shared):
    """Queries and chunks that are not contiguous, an arena inside a larger one, a mask that rows share."""
    whole = arena([200, 5, 3, 0], 16, 16)
    segments = Segments(whole.keys[1:], whole.values[1:], whole.starts - 1, whole.lengths)
    query = torch.randn(2, 3, 4, 16, device=DEVICE).transpose(1, 2)
    key, value = (torch.randn(2, 6, 2, 16, device=DEVICE).transpose(1, 2) for _ in range(2))
    mask = torch.rand(1 if shared else 2, 1, 6, 3, device=DEVICE) < 0.7
    check("triton", query, segments, Chunk(key, value, mask.transpose(2, 3)))


@needs_triton
@pytest.mark.parametrize("num_programs", [1, 2, 5, 40])
@pytest.mark.parametrize("head_dim", [16, 256])
def test_triton_any_number_of_programs_and_any_unit(num_programs, head_dim, poisoned):
    check("triton", *inputs((1, 6, [1000, 0, 130], 1, 16, 16)), num_programs=num_programs, head_dim=head_dim)


@needs_triton
@pytest.mark.parametrize("planned", [[600, 128, 1, 0], [0, 0, 0, 0], [1, 2000, 500, 128]], ids=str)
def test_triton_plan_of_other_lengths(planned, poisoned):
    """A plan is about balance alone: lengths may have grown or fallen since."""
    query, segments = inputs((2, 4, [610, 129, 300, 0], 1, 16, 16))
    plan = plan_work(torch.tensor(planned, device=DEVICE), num_programs=5, backend="triton")
    found = decode_attention(query, segments, plan=plan, backend="triton")
    torch.testing.assert_close(found.out.double(), oracle(query, segments)[0], atol=1e-5, rtol=0)
    assert (found.lse, found.mass) == (None, None)


@needs_triton
def test_triton_repeats_bit_by_bit():
    query, segments = inputs((2, 8, [700, 3, 260, 0], 2, 64, 64))
    plan = plan_work(segments.lengths.to(DEVICE), num_programs=6, backend="triton")
    run = lambda: decode_attention(  # noqa: E731
        query, segments, plan=plan, with_lse=True, with_mass=True, backend="triton"
    )
    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@needs_triton
@pytest.mark.skipif(INTERPRET, reason="Triton's interpreter multiplies bf16 as integers")
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_triton_16_bit(dim, dtype, variant, poisoned):
    """At most twice the error of the torch path in the same dtype."""
    for group in (1, 3, 4, 5, 7, 8, 16):
        given = inputs((2, 2 * group, [1500, 130, 0, 128], 1, dim, dim), dtype)
        kwargs = options(variant, 2 * group)
        exact = oracle(*given, **kwargs)[0]
        plain, found = (decode_attention(*given, **kwargs, backend=name).out.double() for name in ("torch", "triton"))
        error, allowed = (found - exact).abs().max(), (plain - exact).abs().max()
        assert error <= 2 * allowed, f"group {group}: error {error:.2e}, torch {allowed:.2e}"


@needs_triton
@pytest.mark.skipif(INTERPRET, reason="a launch of the interpreter takes a second")
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_triton_several_queries(dtype, dim, poisoned):
    for group, n in ((1, 1), (1, 16), (4, 2), (4, 5), (8, 2), (8, 16)):
        given = inputs((2, 2 * group, [1500, 130, 0, 128], n, dim, dim), dtype)
        chunk = Chunk(*(torch.randn(2, 2, n, dim, device=DEVICE).to(dtype) for _ in range(2)))
        exact = oracle(*given, chunk)[0]
        plain, found = (decode_attention(*given, chunk, backend=name).out.double() for name in ("torch", "triton"))
        error, allowed = (found - exact).abs().max(), (plain - exact).abs().max()
        assert error <= 2 * allowed + 1e-6, f"group {group}, {n} queries: error {error:.2e}, torch {allowed:.2e}"


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31():
    """The last segment of an arena of 9 GB."""
    rows = 2**31 // 64 + 4096
    keys = torch.zeros(rows, 64, dtype=torch.bfloat16, device="cuda")
    values = torch.zeros_like(keys)
    starts, lengths = torch.tensor([0, rows - 3000]), torch.tensor([70, 2900])
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        keys[start : start + length].normal_()
        values[start : start + length].normal_()
    query, segments = torch.randn(1, 8, 1, 64, device="cuda").bfloat16(), Segments(keys, values, starts, lengths)
    found = decode_attention(query, segments, with_mass=True)
    exact = oracle(query, segments)
    assert (found.out.double() - exact[0]).abs().max() <= 1e-2
    assert (found.mass.double() - exact[2]).abs().max() <= 1e-4


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 640), min_size=1, max_size=40), st.integers(1, 60), st.sampled_from([32, 128]))
def test_a_plan_covers_every_unit_once(lengths, num_programs, unit_size):
    """Walks the plan as the kernel does."""
    plan = reference_plan(torch.tensor(lengths), num_programs, unit_size)
    covered = {segment: [] for segment in range(len(lengths))}
    for program, (segment, unit) in enumerate(plan.programs.tolist()):
        left = int(plan.quantum)
        while left > 0 and segment < len(lengths):
            units = int(plan.units[segment])
            take = min(left, units - unit)
            covered[segment].append((program + segment, unit, unit + take))
            left, segment, unit = left - take, segment + 1, 0
    for segment, pieces in covered.items():
        first, count = plan.pieces[segment].tolist()
        assert [number for number, _, _ in pieces] == list(range(first, first + count))
        ends = [0, *(end for _, _, end in pieces)]
        assert [begin for _, begin, _ in pieces] == ends[:-1]
        assert ends[-1] == -(-lengths[segment] // unit_size) + 1


@needs_triton
@pytest.mark.parametrize("shape", [(1,), (3,), (70,), (2, 5), (3, 40)], ids=str)
@pytest.mark.parametrize("num_programs", [1, 20])
@pytest.mark.parametrize("head_dim", [64, 256])
def test_triton_plan(shape, num_programs, head_dim):
    lengths = torch.randint(0, 1000, shape, device=DEVICE)
    found = plan_work(lengths, head_dim=head_dim, num_programs=num_programs, backend="triton")
    expected = reference_plan(lengths, num_programs, unit_of(head_dim))
    assert found.unit == expected.unit
    for name in ("units", "quantum", "programs", "pieces"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    if len(shape) == 2:
        last = found.layer(shape[0] - 1)
        assert torch.equal(last.programs, reference_plan(lengths[-1], num_programs, expected.unit).programs)


@needs_triton
def test_triton_from_ragged_attention(poisoned):
    given = chunked(2, 4, [200, 3, 0, 6], 2, 3, 8)
    out = ragged_attention(*given, backend="triton")
    torch.testing.assert_close(out.double(), oracle(*given)[0], atol=1e-5, rtol=0)
    lengths = given[1].lengths.to(DEVICE)
    work = plan_work(torch.stack([lengths + 3, lengths]), head_dim=8, backend="triton").layer(1)
    assert torch.equal(ragged_attention(*given, plan=work, backend="triton"), out)


@needs_triton
@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 2, 17, 16), "17 queries of 1 heads a group"), ((1, 40, 8, 16), "8 queries of 20 heads a group")],
    ids=str,
)
def test_triton_refuses_many_queries(shape, message):
    segments = arena([4, 5], 16, 16)
    with pytest.raises(ValueError, match=f"backend='triton' cannot do this: {message}, where 16 queries and 128 rows"):
        decode_attention(torch.zeros(shape, device=DEVICE), segments, backend="triton")
    assert decode_attention(torch.zeros(shape, device=DEVICE), segments).out.shape == shape


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lengths": torch.zeros(2, 2, 2)}, r"expected lengths \[S\] or \[L, S\]"),
        ({"lengths": torch.zeros(0)}, r"got \[0\]"),
        ({"lengths": torch.zeros(3), "num_programs": 0}, "num_programs must be at least 1, got 0"),
    ],
    ids=str,
)
def test_a_plan_of_nothing_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan_work(**arguments)


@needs_triton
def test_triton_refuses_other_dims_and_dtypes():
    with pytest.raises(ValueError, match="cannot do this: head dims 288 and 16, where 256 is the most"):
        decode_attention(*inputs((1, 2, [4, 5], 1, 288, 16)), backend="triton")
    with pytest.raises(ValueError, match=r"cannot do this: queries, keys and values of torch.float64, not of one"):
        decode_attention(*inputs((1, 2, [4, 5], 1, 16, 16), torch.float64), backend="triton")
    assert decode_attention(*inputs((1, 2, [4, 5], 1, 288, 16))).out.shape == (1, 2, 1, 16)


def test_a_plan_of_other_segments_is_refused():
    given = inputs((1, 2, [4, 5], 1, 16, 16))
    with pytest.raises(ValueError, match=r"2 segments need a plan whose pieces are \[2, 2\], got \[3, 2\]"):
        decode_attention(*given, plan=plan_work(torch.tensor([1, 2, 3])))
    with pytest.raises(ValueError, match=r"got \[2, 2, 2\]; a plan of several layers"):
        decode_attention(*given, plan=plan_work(torch.tensor([[1, 2], [3, 4]])))
    with pytest.raises(ValueError, match="ragged_attention: 2 segments need a plan"):
        ragged_attention(*given, plan=plan_work(torch.tensor([1, 2, 3])))


def test_what_does_not_fit_is_refused():
    query, segments = inputs((1, 2, [4, 5], 1, 16, 16))
    with pytest.raises(ValueError, match=r"decode_attention: expected values \[15, Dv\] .* got \[14, 16\]"):
        decode_attention(query, replace(segments, values=segments.values[1:]))
    with pytest.raises(ValueError, match="leaves the arena"):
        decode_attention(query, replace(segments, starts=segments.starts + 20))
    blocks = in_blocks([4, 5], [3, 2], 16)
    with pytest.raises(ValueError, match="with_mass needs Segments, got BlockSegments"):
        decode_attention(query, blocks, with_mass=True)
    with pytest.raises(
        ValueError, match=r"expected blocks \[1, P\], and offsets and sizes \[2\], got \[1, 5\], \[2\] and"
    ):
        decode_attention(query, replace(blocks, sizes=blocks.sizes[:1]))
    huge = torch.empty(1, 16).expand(2**31, 16)
    with pytest.raises(ValueError, match=r"an arena of less than 2\*\*31 rows, got 2147483648"):
        decode_attention(query, replace(blocks, keys=huge, values=huge))
