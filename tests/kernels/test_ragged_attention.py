from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kvpolicy_kernels.attention import cpu, ragged_attention, reference
from kvpolicy_kernels.segments import Chunk, Segments

from tests.kernels.segments import DEVICE, NAN, VARIANTS, arena, chunked, interleaved, options, oracle


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """Blocks of 4 queries and, as if there were 6 threads, segments cut in up to 6 parts, so that small cases do."""
    patch = pytest.MonkeyPatch()
    patch.setattr(reference, "BLOCK", 4)
    patch.setattr(cpu, "SHORTEST_PART", 3)
    patch.setattr(torch, "get_num_threads", lambda: 6)
    yield
    patch.undo()


def check(query, segments, chunk=None, tolerance=1e-5, **kwargs):
    out = ragged_attention(query, segments, chunk, **kwargs)
    expected = oracle(query, segments, chunk, **kwargs)[0]
    assert out.dtype == query.dtype
    error = (out.double() - expected).abs().max()
    assert error <= tolerance, f"error {error:.2e}"


# batch, query heads, lengths of the segments, queries, value dim (the head dim is 8)
DECODE = [
    (1, 3, [5, 5, 5], 1, 8),
    (1, 9, [20, 0, 1], 1, 8),
    (1, 9, [20, 0, 1], 1, 12),
    (2, 6, [7, 1, 0, 29], 1, 8),
    (2, 4, [13, 13, 13, 13], 1, 8),
    (1, 4, [20, 20, 6, 6], 2, 8),
    (1, 1, [6], 1, 8),
    (1, 2, [1, 1], 1, 8),
    (1, 2, [0, 0], 1, 8),
    (1, 2, [3, 20], 9, 8),
    (1, 2, [3, 20], 9, 4),
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("backwards", [True, False])
@pytest.mark.parametrize("case", DECODE, ids=str)
def test_decode(case, backwards, variant):
    batch, num_q_heads, lengths, n, value_dim = case
    query = torch.randn(batch, num_q_heads, n, 8, device=DEVICE)
    check(query, arena(lengths, 8, value_dim, backwards=backwards), **options(variant, num_q_heads))


# batch, query heads, lengths of the segments, queries, tokens of the chunk, value dim
CHUNKS = [
    (1, 2, [0], 9, 9, 8),
    (1, 2, [0], 9, 9, 5),
    (2, 2, [0, 0], 3, 5, 8),
    (1, 3, [9], 1, 1, 8),
    (2, 2, [0, 6], 4, 7, 8),
    (1, 2, [3, 0], 9, 2, 8),
    (1, 3, [11, 0, 1], 5, 5, 12),
    (1, 1, [20], 13, 14, 8),
    (2, 6, [0, 1, 4, 3], 3, 0, 8),
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("case", CHUNKS, ids=str)
def test_causal_chunk(case, variant):
    check(*chunked(*case), **options(variant, case[1]))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("case", CHUNKS, ids=str)
def test_masks(case, shared, variant):
    """Random masks of the chunk and of the entries; the first query sees neither."""
    batch, num_q_heads, lengths, n, m, _ = case
    query, segments, chunk = chunked(*case)
    chunk_mask = torch.rand(1 if shared else batch, 1, n, m) < 0.5
    entry_mask = [torch.rand(n, length) < 0.5 for length in lengths]
    for mask in (chunk_mask[0, 0], chunk_mask[-1, 0], *entry_mask):
        mask[0] = False
    chunk, entry_mask = replace(chunk, mask=chunk_mask.to(DEVICE)), [mask.to(DEVICE) for mask in entry_mask]
    check(query, segments, chunk, entry_mask=entry_mask, **options(variant, num_q_heads))


def test_entry_mask_without_a_chunk():
    masks = [torch.rand(4, 6, device=DEVICE) < 0.5, torch.zeros(4, 3, dtype=torch.bool, device=DEVICE)]
    check(torch.randn(1, 4, 4, 8, device=DEVICE), arena([6, 3], 8, 8), entry_mask=masks)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_layout(data):
    batch, group = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    num_kv_heads = data.draw(st.integers(1, 3))
    size = batch * num_kv_heads
    lengths = data.draw(st.lists(st.integers(0, 12), min_size=size, max_size=size))
    n, m = data.draw(st.integers(1, 6)), data.draw(st.none() | st.integers(0, 6))
    query, segments, chunk = chunked(
        batch, group * num_kv_heads, lengths, n, m or 0, data.draw(st.sampled_from([4, 8]))
    )
    variant = data.draw(st.sampled_from(VARIANTS))
    segments = interleaved(segments) if data.draw(st.booleans()) else segments
    check(query, segments, None if m is None else chunk, **options(variant, group * num_kv_heads))


@pytest.mark.parametrize("lengths", [[300, 300, 300], [700, 40, 0]], ids=str)
@pytest.mark.parametrize("variant", [{}, {"sinks": True}, {"softcap": 5.0}], ids=str)
def test_bfloat16(lengths, variant):
    """At most twice the error of dense torch products in bf16."""
    segments = arena(lengths, 64, 64, torch.bfloat16)
    query = torch.randn(1, 9, 1, 64, device=DEVICE).bfloat16()
    given = options(variant, 9)
    expected = oracle(query, segments, **given)[0]
    plain = torch.zeros_like(expected)
    for head in range(9):
        start = int(segments.starts[head // 3])
        rows = slice(start, start + lengths[head // 3])
        scores = query[0, head] @ segments.keys[rows].T * 64**-0.5
        if "softcap" in given:
            scores = torch.tanh(scores / given["softcap"]) * given["softcap"]
        if "sink_logits" in given:
            scores = torch.cat([scores, given["sink_logits"][head].bfloat16().expand(1, 1)], -1)
        plain[0, head] = (torch.softmax(scores, -1)[:, : lengths[head // 3]] @ segments.values[rows]).double()
    check(query, segments, tolerance=2 * (plain - expected).abs().max(), **given)


def test_hand_written_answer():
    """Zero scores average what is visible: two entries, then one more token of the chunk for each query."""
    zeros, tens = torch.zeros(1, 1, 2, 4, device=DEVICE), torch.full((1, 1, 2, 1), 10.0, device=DEVICE)
    keys, values = torch.zeros(4, 4, device=DEVICE), torch.tensor([[NAN], [3.0], [5.0], [NAN]], device=DEVICE)
    segments = Segments(keys, values, torch.tensor([1]), torch.tensor([2]))
    out = ragged_attention(zeros, segments, Chunk(zeros, tens))
    torch.testing.assert_close(out.flatten().cpu(), torch.tensor([6.0, 7.0]))


@pytest.mark.parametrize("lengths", [[70, 5, 3, 3], [6, 6, 6, 6]], ids=str)
def test_views(lengths):
    """Queries that are not contiguous, and an arena that starts in the middle of its storage."""
    segments = arena(lengths, 8, 8)
    query = torch.randn(2, 1, 4, 8, device=DEVICE).transpose(1, 2)
    check(query, Segments(segments.keys[1:], segments.values[1:], segments.starts - 1, segments.lengths))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("case", [*DECODE, *CHUNKS], ids=str)
def test_keys_and_values_of_one_arena(case, variant):
    """Rows that are longer than a key or a value; without a chunk, and with one."""
    *shape, value_dim = case
    query, segments, chunk = chunked(*shape[:4], shape[-1], value_dim)
    for arriving in (None, chunk):
        check(query, interleaved(segments), arriving, **options(variant, case[1]))


REFUSED = [
    ("keys", lambda x: x[:, :5], r"needs keys \[R, 8\] with contiguous rows, got \[28, 5\]"),
    ("keys", lambda x: x.T.contiguous().T, r"got \[28, 8\] with strides \[1, 28\]"),
    ("values", lambda x: x[1:], r"expected values \[28, Dv\] with contiguous rows, got \[27, 12\]"),
    ("values", lambda x: x[:, ::2], r"got \[28, 6\] with strides \[12, 2\]"),
    ("lengths", lambda x: x[:2], r"starts and lengths must be .* got \[4\] and \[2\]"),
    ("starts", lambda x: x + 5, "segment 0 of 3 rows from row 28 leaves the arena of 28 rows"),
    ("sink_logits", lambda _: torch.zeros(3), r"expected sink_logits \[4\], got \[3\]"),
    ("key", lambda x: x[:1], r"expected the chunk's key .* got \[1, 2, 2, 8\]"),
    ("value", lambda x: x[..., :3], r"expected the chunk's value \[2, 2, 2, 12\], got \[2, 2, 2, 3\]"),
    ("mask", lambda _: torch.ones(2, 1, 2, 2).bool(), r"the chunk's mask \[1 or 2, 1, 3, 2\], got \[2, 1, 2, 2\]"),
    ("entry_mask", lambda _: [torch.ones(3, 3).bool()], "4 segments need as many masks, got 1"),
    ("entry_mask", lambda _: [torch.ones(3, 3).bool()] * 4, r"expected entry_mask\[1\] \[3, 4\], got \[3, 3\]"),
]


@pytest.mark.parametrize(("name", "spoil", "message"), REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_what_does_not_fit_is_refused(name, spoil, message):
    query, segments, chunk = chunked(2, 4, [3, 4, 5, 6], 3, 2, 12)
    kwargs = {}
    if hasattr(segments, name):
        segments = replace(segments, **{name: spoil(getattr(segments, name))})
    elif hasattr(chunk, name):
        chunk = replace(chunk, **{name: spoil(getattr(chunk, name))})
    else:
        kwargs[name] = spoil(None)
    with pytest.raises(ValueError, match=message):
        ragged_attention(query, segments, chunk, **kwargs)


def test_a_chunk_has_keys_and_values():
    """Neither goes without the other, and a mask is a chunk's."""
    for name in ("key", "value", "mask"):
        with pytest.raises(TypeError, match="missing"):
            Chunk(**{name: torch.ones(1, 1, 3, 2)})
