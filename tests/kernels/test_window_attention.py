import os

import pytest
import torch
from kvpolicy_kernels.formats import INT4, INT8
from kvpolicy_kernels.window_attention import coded, coded_window_attention, window_attention
from kvpolicy_kernels.window_attention.reference import reference_window_attention, window_mask

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(not (INTERPRET or DEVICE == "cuda"), reason="needs a GPU or TRITON_INTERPRET=1")

# length, query heads, KV heads, head dim, capacities, sinks, prefill
CASES = [
    (1, 2, 2, 16, [5, 9], 4, 0),
    (37, 3, 1, 16, [5], 4, 0),
    (128, 4, 2, 16, [128, 6], 4, 0),
    (129, 4, 2, 16, [128, 129], 4, 0),
    (300, 9, 3, 64, [20, 299, 1000], 4, 0),
    (300, 6, 2, 80, [1, 150], 0, 0),
    (300, 4, 1, 16, [70], 64, 100),
    (300, 4, 1, 16, [170], 8, 299),
    (257, 7, 1, 96, [33], 4, 0),
]
CHUNKS = [(CASES[i], count) for i, count in ((1, 1), (2, 127), (4, 37), (4, 200), (6, 130), (7, 129), (8, 3))]
VARIANTS = [{}, {"softcap": 5.0}, {"sinks": True}, {"scale": 0.3}]


def inputs(length, num_q_heads, num_kv_heads, dim, dtype, batch=2):
    generator = torch.Generator().manual_seed(length + dim)
    make = lambda heads: torch.randn(batch, heads, length, dim, generator=generator).to(DEVICE, dtype)  # noqa: E731
    return make(num_q_heads), make(num_kv_heads), make(num_kv_heads)


def check(case, variant, dtype, backend, count=None, **growth):
    length, num_q_heads, num_kv_heads, dim, capacities, num_sinks, prefill = case
    q, k, v = inputs(length, num_q_heads, num_kv_heads, dim, dtype)
    q = q[:, :, length - (count or length) :]
    sinks = torch.linspace(-1, 1, num_q_heads, device=DEVICE) if variant.get("sinks") else None
    scale, softcap = variant.get("scale", dim**-0.5), variant.get("softcap")
    arguments = (capacities, num_sinks)
    out = window_attention(
        q, k, v, *arguments, scale=scale, softcap=softcap, sink_logits=sinks, prefill_length=prefill, backend=backend,
        **growth,
    )  # fmt: skip
    rest = (scale, softcap, sinks, prefill)
    exact = reference_window_attention(q.double(), k.double(), v.double(), *arguments, *rest, **growth)
    plain = reference_window_attention(q, k, v, *arguments, *rest, **growth)
    error, allowed = (out.double() - exact).abs().max(), (plain.double() - exact).abs().max()
    assert error <= 2 * allowed + 1e-5, f"error {error:.2e}, same-dtype torch {allowed:.2e}"


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"T{c[0]}-HQ{c[1]}-H{c[2]}-D{c[3]}-cap{c[4]}-s{c[5]}-p{c[6]}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torch_matches_the_definition(case, variant, dtype):
    check(case, variant, dtype, "torch")


@needs_triton
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"T{c[0]}-HQ{c[1]}-H{c[2]}-D{c[3]}-cap{c[4]}-s{c[5]}-p{c[6]}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_triton_matches_the_definition(case, variant, dtype, poisoned):
    if INTERPRET and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bf16 as integers")
    check(case, variant, dtype, "triton")


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize(("case", "count"), CHUNKS)
def test_the_last_tokens_may_ask_alone(case, count, variant):
    check(case, variant, torch.float32, "torch", count)


@needs_triton
@pytest.mark.parametrize("variant", [{}, {"softcap": 5.0, "sinks": True}], ids=str)
@pytest.mark.parametrize(("case", "count"), CHUNKS[:4])
def test_the_last_tokens_may_ask_triton_alone(case, count, variant, poisoned):
    check(case, variant, torch.float32, "triton", count)


# a case, how many ask, the tokens of a block, those that are left out
GROWING = [
    ((200, 2, 2, 16, [40, 7], 4, 0), 200, 64, 0),
    ((200, 4, 2, 16, [5, 64], 4, 0), 131, 64, 0),
    ((200, 3, 1, 16, [20], 0, 0), 150, 32, 70),
    ((37, 2, 2, 16, [16, 9], 8, 0), 37, 16, 0),
    ((6, 2, 2, 16, [16, 9], 8, 0), 3, 16, 0),
]


@pytest.mark.parametrize("variant", [{"softcap": 5.0, "sinks": True}], ids=str)
@pytest.mark.parametrize(("case", "count", "tokens_per_block", "skipped"), GROWING, ids=str)
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
def test_capacities_may_grow_with_the_tokens(backend, case, count, tokens_per_block, skipped, variant, poisoned):
    growth = {"tokens_per_block": tokens_per_block, "skipped": skipped}
    check(case, variant, torch.float32, backend, count, **growth)


@pytest.mark.parametrize(("capacity", "num_sinks"), [(5, 2), (16, 4), (1, 0)])
def test_a_growing_window_is_a_list_that_fills_and_evicts(capacity, num_sinks):
    seen, entries = window_mask([capacity], num_sinks, 100, tokens_per_block=16)[0], []
    for token in range(100):
        if len(entries) == capacity * (token // 16 + 1):
            entries.remove(next(one for one in entries if one >= num_sinks))
        entries.append(token)
        assert seen[token].nonzero()[:, 0].tolist() == entries


def test_what_does_not_go_with_growing_windows_is_refused():
    q, k, v = inputs(8, 4, 2, 16, torch.float32)
    with pytest.raises(ValueError, match="prefill_length must be 0 with tokens_per_block, got 3"):
        window_attention(q, k, v, [5, 9], 4, prefill_length=3, tokens_per_block=16)


def test_capacities_may_be_a_tensor():
    q, k, v = inputs(128, 4, 2, 16, torch.float32)
    found = window_attention(q, k, v, torch.tensor([20, 50]), 4)
    assert torch.equal(found, window_attention(q, k, v, [20, 50], 4))


def test_more_queries_than_tokens_are_refused():
    q, k, v = inputs(8, 4, 2, 16, torch.float32)
    with pytest.raises(ValueError, match="of a T of at least 8"):
        window_attention(q, k[:, :, 1:], v[:, :, 1:], [5, 9], 4)


def test_hand_written_answer():
    """One head, identity-like scores: with capacity 2 and one sink a token averages the sink and itself."""
    q = torch.zeros(1, 1, 4, 16)
    v = torch.arange(4.0).reshape(1, 1, 4, 1)
    out = window_attention(q, q, v, [2], 1)
    assert out.flatten().tolist() == [0.0, 0.5, 1.0, 1.5]


def test_non_contiguous_queries():
    q, k, v = inputs(200, 4, 2, 16, torch.float32)
    strided = q.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(window_attention(strided, k, v, [20, 50], 4), window_attention(q, k, v, [20, 50], 4))


@pytest.mark.parametrize(
    ("capacities", "message"), [([4, 9], "above num_sink_tokens = 4"), ([9], "expected 2 capacities")]
)
def test_bad_capacities_are_refused(capacities, message):
    q, k, v = inputs(8, 4, 2, 16, torch.float32)
    with pytest.raises(ValueError, match=message):
        window_attention(q, k, v, capacities, 4)


@pytest.mark.parametrize("entry_format", [INT8, INT4], ids=["int8", "int4"])
@pytest.mark.parametrize("variant", [{}, {"softcap": 5.0}], ids=str)
def test_over_codes_blocks_of_any_size_say_the_same(entry_format, variant, monkeypatch):
    """What a GPU runs in fewer blocks than a CPU."""
    q, k, v = inputs(300, 6, 2, 64, torch.float32)
    found = []
    for block in (16, 128, 1024):
        monkeypatch.setitem(coded._BLOCKS, DEVICE, block)
        found.append(coded_window_attention(q, k, v, [50, 170], 4, entry_format, prefill_length=9, **variant))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-5)
