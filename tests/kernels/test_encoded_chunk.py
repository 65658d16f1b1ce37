"""Attention of many queries over codes; of few, and what counts where, see test_encoded_attention.py."""

from dataclasses import replace

import pytest
import torch
from kvpolicy_kernels.encoded_attention import encoded_attention
from kvpolicy_kernels.formats import INT4, INT8, EntryFormat
from kvpolicy_kernels.segments import Chunk

from tests.kernels.segments import DEVICE, VARIANTS, key_centre, options, oracle
from tests.kernels.test_encoded_attention import INTERPRET, copies_of, encoded

pytestmark = pytest.mark.skipif(not (INTERPRET or DEVICE == "cuda"), reason="needs a GPU or TRITON_INTERPRET=1")
if INTERPRET or DEVICE == "cuda":
    from kvpolicy_kernels.attention.chunk import kernel as plain_kernel
    from kvpolicy_kernels.encoded_attention.chunk import kernel

FORMATS = [INT8, INT4]
formats = pytest.mark.parametrize("entry_format", FORMATS, ids=str)


@pytest.fixture(autouse=True)
def whole(monkeypatch):
    """The merge of the interpreter is slow, so that tests ask for it."""
    monkeypatch.setattr(plain_kernel, "MOST_PARTS", 1)


def check(query, segments, chunk=None, *, counted=None, copies=None, slack=1e-5, **kwargs):
    """At most twice the error of the torch path, against fp64 over the decoded entries.

    counted: the entries as they count, where that is not as they are decoded
    """
    counted = segments.decoded(torch.float32) if counted is None else counted
    exact = oracle(query, counted, chunk, **kwargs)[0]
    out, plain = (
        encoded_attention(query, segments, chunk, copies=copies, backend=name, **kwargs).out
        for name in ("triton", "torch")
    )
    assert (out.dtype, out.shape) == (plain.dtype, plain.shape)
    error, allowed = ((x.double() - exact).abs().max() for x in (out, plain))
    assert error <= 2 * allowed + slack, f"error {error:.2e}, torch {allowed:.2e}"


def chunk_of(batch, heads, m, dims, dtype=torch.float32):
    return Chunk(*(torch.randn(batch, heads, m, dim, device=DEVICE).to(dtype) for dim in dims))


# batch, query heads, lengths of the segments, queries, tokens of the chunk, head dims
CASES = [
    (1, 4, [70, 0], 20, 20, (16, 16)),
    (2, 2, [31, 33], 17, 17, (64, 64)),
    (2, 4, [0, 1, 16, 32], 17, 24, (32, 48)),
    (1, 14, [65, 40], 17, 40, (64, 64)),  # groups of 7
    (1, 6, [0, 0], 40, 40, (16, 16)),
    (1, 2, [97, 5], 64, 30, (80, 80)),  # the first queries see no token of the chunk
    (1, 2, [5, 18], 300, 300, (16, 32)),
    (1, 16, [33], 9, 9, (128, 128)),  # few queries of many heads
]


def inputs(case, entry_format):
    batch, num_q_heads, lengths, n, m, dims = case
    query = torch.randn(batch, num_q_heads, n, dims[0], device=DEVICE)
    return query, encoded(lengths, *dims, entry_format), chunk_of(batch, len(lengths) // batch, m, dims)


@pytest.mark.parametrize(("case", "variant"), list(zip(CASES, [*VARIANTS, *VARIANTS[:3]], strict=True)), ids=str)
@formats
def test_triton_entries_and_a_causal_chunk(entry_format, case, variant, poisoned):
    query, segments, chunk = inputs(case, entry_format)
    check(query, segments, chunk, **options(variant, case[1]))


@pytest.mark.parametrize("entry_format", [EntryFormat(4), EntryFormat(8, rotated=True)], ids=str)
@pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[4]], ids=str)
def test_triton_entries_alone(variant, entry_format, poisoned):
    query, segments, _ = inputs(CASES[0], entry_format)
    check(query, segments, **options(variant, CASES[0][1]))


@pytest.mark.parametrize("shared", [False, True])
@formats
def test_triton_masks_of_the_chunk(entry_format, shared, poisoned):
    """The first query sees none of it."""
    query, segments, chunk = inputs(CASES[2], entry_format)
    mask = torch.rand(1 if shared else 2, 1, 17, 24, device=DEVICE) < 0.5
    mask[:, :, 0] = False
    check(query, segments, replace(chunk, mask=mask))


@pytest.mark.parametrize(
    ("seen", "num_sinks", "recent", "variant"),
    [([150, 60], 4, 9, {}), ([90, 400], 0, 33, {"softcap": 3.0, "sinks": True}), ([3, 7], 4, 5, {"sinks": True})],
    ids=str,
)
@formats
def test_triton_exact_copies(entry_format, seen, num_sinks, recent, variant, poisoned):
    """Hidden codes, in every tile or in all of one, a ring that is not full, and sinks that have not all come."""
    lengths = [min(seen[i // 2], num_sinks + recent + extra) for i, extra in enumerate((40, 0, 3, 20))]
    segments, copies, counted = copies_of(encoded(lengths, 32, 16, entry_format), 2, num_sinks, recent, seen, (32, 16))
    free = (copies.positions < 0)[:, None, :, None]
    copies = replace(copies, key=copies.key.masked_fill(free, 10.0))
    query, chunk = torch.randn(2, 6, 20, 32, device=DEVICE), chunk_of(2, 2, 25, (32, 16))
    kwargs = options(variant, 6) | {"copies": copies, "counted": counted}
    check(query, segments, chunk, **kwargs)
    check(query, segments, **kwargs)
    mask = torch.rand(2, 1, 20, 25, device=DEVICE) < 0.5
    check(query, segments, replace(chunk, mask=mask), **kwargs)


@pytest.mark.parametrize(("beside", "pairs"), [("nothing", 3), ("copies", 4), ("chunk", 1), ("nothing", 0)])
@formats
def test_triton_key_centre(entry_format, beside, pairs, poisoned):
    segments = encoded([150, 13, 40, 90], 32, 16, entry_format)
    positions = torch.randint(2**20, (len(segments.keys.codes),), dtype=torch.int32, device=DEVICE)
    segments = replace(segments, positions=positions, key_centre=key_centre(2, 32, pairs=pairs))
    query, extra = torch.randn(2, 6, 17, 32, device=DEVICE), {}
    if beside == "copies":
        segments, extra["copies"], extra["counted"] = copies_of(segments, 2, 4, 9, [300, 200], (32, 16))
    if beside == "chunk":
        extra["chunk"] = chunk_of(2, 2, 20, (32, 16))
    check(query, segments, slack=1e-4, **extra)
    check(query, segments, slack=1e-4, softcap=5.0, sink_logits=torch.ones(6, device=DEVICE), **extra)


@pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[4]], ids=str)
@pytest.mark.parametrize("parts", [pytest.param(2, marks=pytest.mark.slow), 5])
def test_triton_split(parts, variant, poisoned, monkeypatch):
    """Entries in several parts, some of them empty or hidden, and then what is exact in several, too."""
    for module in (kernel, plain_kernel):
        monkeypatch.setattr(module, "parts_of", lambda *_: parts)
    segments, copies, counted = copies_of(encoded([70, 33], 16, 32, INT4), 1, 4, 20, [150], (16, 32))
    query, chunk = torch.randn(1, 4, 17, 16, device=DEVICE), chunk_of(1, 2, 20, (16, 32))
    check(query, segments, chunk, copies=copies, counted=counted, **options(variant, 4))
    check(query, encoded([150, 0], 16, 32, INT4), **options(variant, 4))


@pytest.mark.parametrize("masked", [False, True])
def test_triton_queries_in_several_passes(masked, poisoned, monkeypatch):
    """The first of which see nothing of the chunk, unless a mask says what."""
    monkeypatch.setattr(kernel, "queries_at_once", lambda _: 20)
    query, segments, chunk = inputs(CASES[5], INT4)
    mask = torch.rand(1, 1, 64, 30, device=DEVICE) < 0.5 if masked else None
    check(query, segments, replace(chunk, mask=mask))


@pytest.mark.parametrize(("heads", "queries"), [(1, 32768), (32, 1024), (2048, 128)])
def test_triton_passes_fill_tiles(heads, queries):
    assert kernel.queries_at_once(heads) == queries


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_triton_any_scale(scale, poisoned):
    check(*inputs(CASES[0], INT4), scale=scale)


def test_triton_strides(poisoned):
    """Rows of codes and scales that are further apart, queries and a chunk that are not contiguous."""
    segments = encoded([80, 5], 16, 16, INT4)

    def apart(column):
        return type(column)(*(torch.cat([part, part], 1)[:, : part.shape[1]] for part in column))

    segments = replace(segments, keys=apart(segments.keys), values=apart(segments.values))
    query = torch.randn(1, 20, 4, 16, device=DEVICE).transpose(1, 2)
    key, value = (torch.randn(1, 25, 2, 16, device=DEVICE).transpose(1, 2) for _ in range(2))
    check(query, segments, Chunk(key, value))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("centred", [False, True])
@formats
def test_triton_16_bit(entry_format, centred, dtype, poisoned):
    if INTERPRET and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bf16 as integers")
    sizes = [(64, 7, 17)]
    if not INTERPRET:
        sizes = [(64, 7, 17), (128, 4, 300)] if centred else [(80, 3, 100), (128, 8, 40), (256, 4, 100)]
    for dim, group, n in sizes:
        lengths = [150 if INTERPRET else 3000, 130, 50, 128]
        segments = encoded(lengths, dim, dim, entry_format)
        positions = torch.randint(2**17, (len(segments.keys.codes),), dtype=torch.int32, device=DEVICE)
        segments = replace(segments, positions=positions)
        if centred:
            segments = replace(segments, key_centre=key_centre(2, dim, pairs=8, size=1.0))
        query = torch.randn(2, 2 * group, n, dim, device=DEVICE).to(dtype)
        chunk = chunk_of(2, 2, n + 3, (dim, dim), dtype)
        check(query, segments, slack=0.0)
        check(query, segments, chunk, slack=0.0)
        segments, copies, counted = copies_of(segments, 2, 4, 32, [5000, 5000], (dim, dim))
        copies = replace(copies, key=copies.key.to(dtype), value=copies.value.to(dtype))
        check(query, segments, chunk, copies=copies, counted=counted, slack=0.0)


def test_triton_weights_of_every_size():
    """Values that are tiny, and weights that differ by many orders: fp16 alone would lose them."""
    segments = encoded([150, 70], 64, 64, INT4)
    segments = replace(segments, values=replace_scales(segments.values, 2.0**-9))
    check(4 * torch.randn(1, 6, 17, 64, device=DEVICE).half(), segments, slack=0.0)


def replace_scales(column, factor):
    return type(column)(column.codes, column.scales * factor)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_triton_tables_on_the_device(monkeypatch):
    """Nothing is read back."""
    segments, copies, counted = copies_of(encoded([70, 33], 16, 16, INT4), 1, 4, 9, [150], (16, 16))
    query, chunk = torch.randn(1, 4, 20, 16, device=DEVICE), chunk_of(1, 2, 20, (16, 16))
    expected = oracle(query, counted, chunk)[0]
    segments = replace(segments, starts=segments.starts.to(DEVICE), lengths=segments.lengths.to(DEVICE))
    if DEVICE == "cpu":
        monkeypatch.setattr(torch.Tensor, "tolist", None)
        monkeypatch.setattr(torch.Tensor, "__bool__", None)
    else:
        encoded_attention(query, segments, chunk, copies=copies)  # compiles
        torch.cuda.set_sync_debug_mode("error")
    try:
        out = encoded_attention(query, segments, chunk, copies=copies, backend="triton").out
    finally:
        if DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    monkeypatch.undo()
    assert (out.double() - expected).abs().max() <= 1e-5
