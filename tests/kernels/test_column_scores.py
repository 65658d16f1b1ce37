import itertools
import math

import pytest
import torch
from kvpolicy_kernels.column_scores import column_scores
from kvpolicy_kernels.ragged_attention import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = float("nan")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(reference, "BLOCK", 4)


def arena(lengths, dim=8, dtype=torch.float32):
    """keys, starts, lengths: segments in reverse order, with a row of NaN before, between and after them."""
    keys = torch.full((sum(lengths) + len(lengths) + 1, dim), NAN)
    starts, row = [0] * len(lengths), 1
    for i in reversed(range(len(lengths))):
        starts[i] = row
        keys[row : row + lengths[i]] = torch.randn(lengths[i], dim)
        row += lengths[i] + 1
    return keys.to(DEVICE, dtype), torch.tensor(starts), torch.tensor(lengths)


def oracle(query, keys, starts, lengths, *, scale=None, softcap=None, sink_logits=None, chunk_key=None,
           chunk_mask=None, query_mask=None):  # fmt: skip
    """One query at a time in fp64; every visible column gets its weight."""
    batch, num_q_heads, n, dim = query.shape
    num_kv_heads = len(starts) // batch
    m, longest = 0 if chunk_key is None else chunk_key.shape[2], int(max(lengths))
    out = torch.zeros(batch, num_kv_heads, longest + m, dtype=torch.float64)
    for b, hq, i in itertools.product(range(batch), range(num_q_heads), range(n)):
        if query_mask is not None and not query_mask[b, i]:
            continue
        h = hq // (num_q_heads // num_kv_heads)
        start, length = (int(x[b * num_kv_heads + h]) for x in (starts, lengths))
        row = [j <= i + m - n for j in range(m)] if chunk_mask is None else chunk_mask[b % len(chunk_mask), 0, i]
        tokens = [j for j in range(m) if row[j]]
        k = keys[start : start + length]
        k = k if chunk_key is None else torch.cat([k, chunk_key[b, h, tokens]])
        x = k.cpu().double() @ query[b, hq, i].cpu().double() * (dim**-0.5 if scale is None else scale)
        x = x if softcap is None else softcap * (x / softcap).tanh()
        total = x.exp().sum() + (0 if sink_logits is None else math.exp(sink_logits[hq]))
        out[b, h, [*range(length), *(longest + j for j in tokens)]] += x.exp() / total
    return out


def check(query, keys, starts, lengths, **kwargs):
    out = column_scores(query, keys, starts, lengths, **kwargs).cpu()
    expected = oracle(query, keys, starts, lengths, **kwargs)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=1e-5)
    assert (out[expected == 0] == 0).all(), "an absent or invisible column got mass"


# batch, query heads, lengths of the segments, queries, tokens of the chunk or None
CASES = [
    (1, 3, [5], 1, None),
    (1, 6, [7, 0], 9, None),
    (2, 2, [3, 1, 0, 6], 3, 3),
    (1, 3, [0], 9, 9),
    (1, 2, [4, 0], 6, 2),
    (2, 3, [2, 11], 5, 7),
    (1, 1, [0], 2, None),
]
VARIANTS = [{}, {"softcap": 2.0}, {"sinks": True}, {"scale": 0.6}]


def inputs(case, variant, dtype=torch.float32):
    batch, num_q_heads, lengths, n, m = case
    query = torch.randn(batch, num_q_heads, n, 8, device=DEVICE).to(dtype)
    kwargs = {name: x for name, x in variant.items() if name != "sinks"}
    if "sinks" in variant:
        kwargs["sink_logits"] = torch.linspace(-1, 2, num_q_heads, device=DEVICE)
    if m is not None:
        kwargs["chunk_key"] = torch.randn(batch, len(lengths) // batch, m, 8, device=DEVICE).to(dtype)
    return (query, *arena(lengths, 8, dtype)), kwargs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_definition(case, variant, dtype):
    arguments, kwargs = inputs(case, variant, dtype)
    check(*arguments, **kwargs)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("case", [c for c in CASES if c[-1]], ids=str)
def test_masks(case, shared, variant):
    """Random masks of the chunk; the first query sees none of it. Padding queries are NaN, as from padding tokens."""
    arguments, kwargs = inputs(case, variant)
    batch, _, _, n, m = case
    mask = torch.rand(1 if shared else batch, 1, n, m) < 0.5
    mask[:, :, 0] = False
    counts = torch.rand(batch, n) < 0.5
    arguments[0][~counts.to(DEVICE)[:, None].expand(arguments[0].shape[:3])] = NAN
    check(*arguments, **kwargs, chunk_mask=mask.to(DEVICE), query_mask=counts.to(DEVICE))


def test_hand_written_answer():
    """Zero scores share a query's mass evenly: over two entries and one token, then over two entries and two tokens."""
    zeros, keys = torch.zeros(1, 1, 2, 4, device=DEVICE), torch.zeros(2, 4, device=DEVICE)
    out = column_scores(zeros, keys, torch.tensor([0]), torch.tensor([2]), chunk_key=zeros)
    torch.testing.assert_close(out.flatten().cpu(), torch.tensor([7 / 12, 7 / 12, 7 / 12, 1 / 4]))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "keys",
            torch.zeros(9, 5),
            r"column_scores: query \[2, 4, 3, 8\] needs contiguous keys \[R, 8\], got \[9, 5\]",
        ),
        ("starts", torch.tensor([0, 4, 6]), r"column_scores: starts and lengths must be .* got \[3\] and \[2\]"),
        ("lengths", torch.tensor([3, 9]), "segment 1 of 9 rows from row 4 leaves the arena of 9 rows"),
        ("sink_logits", torch.zeros(2), r"expected sink_logits \[4\], got \[2\]"),
        ("chunk_key", torch.zeros(2, 2, 3, 8), r"column_scores: expected chunk_key .* got \[2, 2, 3, 8\]"),
        ("chunk_mask", torch.ones(1, 1, 2, 3).bool(), r"chunk_mask \[1 or 2, 1, 3, 3\], got \[1, 1, 2, 3\]"),
        ("query_mask", torch.ones(1, 3).bool(), r"expected query_mask \[2, 3\], got \[1, 3\]"),
    ],
)
def test_what_does_not_fit_is_refused(name, value, message):
    arguments = {
        "query": torch.zeros(2, 4, 3, 8),
        "keys": torch.zeros(9, 8),
        "starts": torch.tensor([0, 4]),
        "lengths": torch.tensor([3, 4]),
        "chunk_key": torch.zeros(2, 1, 3, 8),
    }
    with pytest.raises(ValueError, match=message):
        column_scores(**arguments | {name: value})
