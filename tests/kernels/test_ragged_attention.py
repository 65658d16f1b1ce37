import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kvpolicy_kernels.ragged_attention import ragged_attention
from kvpolicy_kernels.ragged_attention.reference import BLOCK

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = float("nan")


def arena(lengths, dim, value_dim, dtype=torch.float32, gap=2):
    """keys, values, starts, lengths: segments in reverse order, with rows of NaN before, between and after them."""
    rows = sum(lengths) + gap * (len(lengths) + 1)
    keys, values = torch.full((rows, dim), NAN), torch.full((rows, value_dim), NAN)
    starts, row = [0] * len(lengths), gap
    for i in reversed(range(len(lengths))):
        starts[i] = row
        keys[row : row + lengths[i]] = torch.randn(lengths[i], dim)
        values[row : row + lengths[i]] = torch.randn(lengths[i], value_dim)
        row += lengths[i] + gap
    return keys.to(DEVICE, dtype), values.to(DEVICE, dtype), torch.tensor(starts), torch.tensor(lengths)


def sees(chunk_mask, b, i, j, offset):
    return j <= i + offset if chunk_mask is None else bool(chunk_mask[b % len(chunk_mask), 0, i, j])


def oracle(query, keys, values, starts, lengths, *, scale=None, softcap=None, sink_logits=None,
           chunk_key=None, chunk_value=None, chunk_mask=None, entry_mask=None):  # fmt: skip
    """One query at a time in fp64, over the list of what it sees."""
    batch, num_q_heads, n, dim = query.shape
    num_kv_heads = len(starts) // batch
    scale = dim**-0.5 if scale is None else scale
    out = torch.zeros(batch, num_q_heads, n, values.shape[1], dtype=torch.float64)
    for b in range(batch):
        for hq in range(num_q_heads):
            h = hq // (num_q_heads // num_kv_heads)
            s = b * num_kv_heads + h
            start, length = int(starts[s]), int(lengths[s])
            for i in range(n):
                entries = [j for j in range(length) if entry_mask is None or entry_mask[s][i, j]]
                rows = torch.tensor([start + j for j in entries], dtype=torch.int64)
                k, v = keys.cpu().double()[rows], values.cpu().double()[rows]
                if chunk_key is not None:
                    m = chunk_key.shape[2]
                    tokens = torch.tensor([j for j in range(m) if sees(chunk_mask, b, i, j, m - n)], dtype=torch.int64)
                    k = torch.cat([k, chunk_key.cpu().double()[b, h, tokens]])
                    v = torch.cat([v, chunk_value.cpu().double()[b, h, tokens]])
                x = k @ query.cpu().double()[b, hq, i] * scale
                x = x if softcap is None else softcap * (x / softcap).tanh()
                total = x.exp().sum() + (0 if sink_logits is None else math.exp(sink_logits[hq]))
                out[b, hq, i] = (x.exp() / total) @ v if len(x) else 0
    return out


def check(query, keys, values, starts, lengths, tolerance=1e-5, **kwargs):
    out = ragged_attention(query, keys, values, starts, lengths, **kwargs)
    expected = oracle(query, keys, values, starts, lengths, **kwargs)
    assert out.dtype == query.dtype
    error = (out.cpu().double() - expected).abs().max()
    assert error <= tolerance, f"error {error:.2e}"


# batch, query heads, lengths of the segments, queries, head dim, value dim
DECODE = [
    (1, 3, [5, 5, 5], 1, 16, 16),
    (1, 9, [40, 0, 1], 1, 16, 24),
    (2, 6, [7, 1, 0, 129], 1, 16, 8),
    (2, 4, [33, 33, 33, 33], 2, 8, 8),
    (1, 3, [2500], 1, 16, 16),
    (1, 4, [2049, 1300, 700, 4099], 1, 8, 8),
    (1, 2, [0, 0], 1, 8, 8),
    (1, 2, [3, 20], BLOCK + 3, 8, 8),
]
VARIANTS = [{}, {"softcap": 2.0}, {"sinks": True}, {"scale": 0.6}, {"softcap": 3.0, "sinks": True}]


def options(variant, num_q_heads):
    kept = {name: x for name, x in variant.items() if name != "sinks"}
    return kept | ({"sink_logits": torch.linspace(-1, 2, num_q_heads, device=DEVICE)} if "sinks" in variant else {})


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("case", DECODE, ids=str)
def test_decode(case, variant):
    batch, num_q_heads, lengths, n, dim, value_dim = case
    query = torch.randn(batch, num_q_heads, n, dim, device=DEVICE)
    check(query, *arena(lengths, dim, value_dim), **options(variant, num_q_heads))


def chunked(batch, num_q_heads, lengths, n, m, dim=8, value_dim=12):
    num_kv_heads = len(lengths) // batch
    chunk = {
        "chunk_key": torch.randn(batch, num_kv_heads, m, dim, device=DEVICE),
        "chunk_value": torch.randn(batch, num_kv_heads, m, value_dim, device=DEVICE),
    }
    return (torch.randn(batch, num_q_heads, n, dim, device=DEVICE), *arena(lengths, dim, value_dim)), chunk


# batch, query heads, lengths of the segments, queries, tokens of the chunk
CHUNKS = [
    (1, 1, [0], 5, 5),
    (1, 3, [9], 1, 1),
    (2, 2, [0, 6], 4, 7),
    (1, 2, [3, 0], 6, 2),
    (1, 3, [11, 0, 1], 6, 6),
    (1, 1, [20], BLOCK + 2, BLOCK + 2),
    (1, 1, [3], BLOCK + 5, 3),
    (2, 6, [0, 1, 4, 3], 3, 0),
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("case", CHUNKS, ids=str)
def test_causal_chunk(case, variant):
    inputs, chunk = chunked(*case)
    check(*inputs, **chunk, **options(variant, case[1]))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("case", CHUNKS, ids=str)
def test_masks(case, shared, variant):
    """Random masks of the chunk and of the entries; the first query sees neither."""
    batch, num_q_heads, lengths, n, m = case
    inputs, chunk = chunked(*case)
    chunk_mask = torch.rand(1 if shared else batch, 1, n, m) < 0.5
    entry_mask = [torch.rand(n, length) < 0.5 for length in lengths]
    chunk_mask[:, :, 0] = False
    for mask in entry_mask:
        mask[0] = False
    masks = {"chunk_mask": chunk_mask.to(DEVICE), "entry_mask": [mask.to(DEVICE) for mask in entry_mask]}
    check(*inputs, **chunk, **masks, **options(variant, num_q_heads))


def test_entry_mask_without_a_chunk():
    keys, values, starts, lengths = arena([6, 3], 8, 8)
    masks = [torch.rand(4, 6, device=DEVICE) < 0.5, torch.zeros(4, 3, dtype=torch.bool, device=DEVICE)]
    check(torch.randn(1, 4, 4, 8, device=DEVICE), keys, values, starts, lengths, entry_mask=masks)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_layout(data):
    batch, group = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    num_kv_heads = data.draw(st.integers(1, 3))
    size = batch * num_kv_heads
    lengths = data.draw(st.lists(st.integers(0, 12), min_size=size, max_size=size))
    n, m = data.draw(st.integers(1, 6)), data.draw(st.none() | st.integers(0, 6))
    inputs, chunk = chunked(batch, group * num_kv_heads, lengths, n, m or 0)
    variant = data.draw(st.sampled_from(VARIANTS))
    check(*inputs, **({} if m is None else chunk), **options(variant, group * num_kv_heads))


@pytest.mark.parametrize("lengths", [[300, 300, 300], [2700, 300, 900]])
@pytest.mark.parametrize("variant", [{}, {"sinks": True}], ids=str)
def test_bfloat16(lengths, variant):
    """At most twice the error of dense torch products in bf16."""
    keys, values, starts, lengths = arena(lengths, 64, 64, torch.bfloat16)
    query = torch.randn(1, 9, 1, 64, device=DEVICE).bfloat16()
    sinks = options(variant, 9)
    expected = oracle(query, keys, values, starts, lengths, **sinks)
    plain = torch.zeros_like(expected)
    for head in range(9):
        rows = slice(int(starts[head // 3]), int(starts[head // 3] + lengths[head // 3]))
        scores = query[:, head] @ keys[rows].T * 64**-0.5
        if sinks:
            scores = torch.cat([scores, sinks["sink_logits"][head].bfloat16().expand(1, 1, 1)], -1)
        plain[:, head] = (torch.softmax(scores, -1)[..., : int(lengths[head // 3])] @ values[rows]).double()
    allowed = (plain - expected).abs().max()
    check(query, keys, values, starts, lengths, 2 * allowed, **sinks)


def test_hand_written_answer():
    """Zero scores average what is visible: two entries, then one more token of the chunk per query."""
    zeros, ones = torch.zeros(1, 1, 2, 4), torch.ones(1, 1, 2, 1)
    keys, values = torch.zeros(4, 4), torch.tensor([[NAN], [3.0], [5.0], [NAN]])
    out = ragged_attention(
        zeros, keys, values, torch.tensor([1]), torch.tensor([2]), chunk_key=zeros, chunk_value=10 * ones
    )
    torch.testing.assert_close(out.flatten(), torch.tensor([6.0, 7.0]))


def test_non_contiguous_queries():
    keys, values, starts, lengths = arena([70, 5], 8, 8)
    query = torch.randn(1, 3, 4, 8, device=DEVICE).transpose(1, 2)
    check(query, keys, values, starts, lengths)


def bad(name):
    (query, keys, values, starts, lengths), chunk = chunked(2, 4, [3, 4, 5, 6], 3, 2)
    arguments = dict(query=query, keys=keys, values=values, starts=starts, lengths=lengths, **chunk)
    changes = {
        "keys": keys[:, :5],
        "values": values[1:],
        "lengths": lengths[:2],
        "starts": starts + 5,
        "sink_logits": torch.zeros(3),
        "chunk_key": chunk["chunk_key"][:1],
        "chunk_value": None,
        "chunk_mask": torch.ones(2, 1, 2, 2, dtype=torch.bool),
        "entry_mask": [torch.ones(3, 3, dtype=torch.bool)],
    }
    return arguments | {name: changes[name]}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("keys", r"needs keys \[R, 8\], got \[28, 5\]"),
        ("values", r"expected values \[28, Dv\], got \[27, 12\]"),
        ("lengths", r"starts and lengths must be .* got \[4\] and \[2\]"),
        ("starts", "segment 0 of 3 rows from row 28 leaves the arena of 28 rows"),
        ("sink_logits", r"expected sink_logits \[4\], got \[3\]"),
        ("chunk_key", r"expected chunk_key .* got \[1, 2, 2, 8\]"),
        ("chunk_value", "come together"),
        ("chunk_mask", r"expected chunk_mask \[1 or 2, 1, 3, 2\], got \[2, 1, 2, 2\]"),
        ("entry_mask", "4 segments need as many masks, got 1"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        ragged_attention(**bad(name))
