"""The Triton kernel of many queries, through the public door; the definition is tested in test_ragged_attention.py."""

import os
from dataclasses import replace

import pytest
import torch
from kvpolicy_kernels.attention import ragged_attention
from kvpolicy_kernels.segments import Chunk, Segments

from tests.kernels.segments import DEVICE, VARIANTS, arena, chunked, interleaved, options, oracle

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(not (INTERPRET or DEVICE == "cuda"), reason="needs a GPU or TRITON_INTERPRET=1")
if INTERPRET or DEVICE == "cuda":
    from kvpolicy_kernels.attention.chunk import kernel


@pytest.fixture(autouse=True)
def whole(monkeypatch):
    """The merge of the interpreter is slow, so that tests ask for it."""
    monkeypatch.setattr(kernel, "MOST_PARTS", 1)


def check(query, segments, chunk=None, dtype=torch.float32, **kwargs):
    """At most twice the error of torch in the same dtype."""
    segments = replace(segments, keys=segments.keys.to(dtype), values=segments.values.to(dtype))
    query, chunk = query.to(dtype), chunk and replace(chunk, key=chunk.key.to(dtype), value=chunk.value.to(dtype))
    exact = oracle(query, segments, chunk, **kwargs)[0]
    out, plain = (ragged_attention(query, segments, chunk, backend=name, **kwargs) for name in ("triton", "torch"))
    assert (out.dtype, out.shape) == (plain.dtype, plain.shape)
    error, allowed = ((x.double() - exact).abs().max() for x in (out, plain))
    assert error <= 2 * allowed + 1e-6, f"error {error:.2e}, torch {allowed:.2e}"


# batch, query heads, lengths of the segments, queries, tokens of the chunk, value dim (the head dim is 16)
CASES = [
    (1, 4, [70], 20, 20, 16),  # tiles of 32 x 32: a full one, a tail
    (1, 2, [31, 33], 17, 17, 16),
    (2, 4, [0, 1, 32, 64], 17, 24, 24),
    (1, 8, [65], 17, 40, 16),
    (1, 6, [0, 0], 40, 40, 8),
    (1, 2, [97, 0], 64, 30, 16),  # the first queries see no token of the chunk
    (1, 1, [5], 130, 130, 16),
    (3, 3, [40, 2, 1], 17, 0, 16),
]


@pytest.mark.parametrize(("case", "variant"), list(zip(CASES, [*VARIANTS, *VARIANTS[:3]], strict=True)), ids=str)
def test_causal_chunk(case, variant, poisoned):
    query, segments, chunk = chunked(*case, dim=16)
    check(query, segments, chunk, **options(variant, case[1]))
    check(query, segments, **options(variant, case[1]))


def test_small_scores_that_are_capped():
    """They are differences of numbers near one: an error of float32's last digit would be many of theirs."""
    check(*chunked(2, 2, [600, 130, 0, 1024], 17, 22, 64, dim=64), softcap=30.0)


@pytest.mark.parametrize("variant", VARIANTS[1:], ids=str)
def test_variants(variant, poisoned):
    check(*chunked(1, 4, [70, 3], 20, 20, 16, dim=16), **options(variant, 4))


def random_masks(batch, lengths, n, m):
    """Of the chunk and of the entries; the first query sees neither."""
    chunk_mask = torch.rand(batch, 1, n, m) < 0.5
    entry_mask = [torch.rand(n, length) < 0.5 for length in lengths]
    for mask in (*chunk_mask[:, 0], *entry_mask):
        mask[0] = False
    return chunk_mask.to(DEVICE), [mask.to(DEVICE) for mask in entry_mask]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("case", "variant"), list(zip(CASES[1:6], VARIANTS, strict=True)), ids=str)
def test_masks(case, shared, variant, poisoned):
    batch, num_q_heads, lengths, n, m, _ = case
    query, segments, chunk = chunked(*case, dim=16)
    chunk_mask, entry_mask = random_masks(1 if shared else batch, lengths, n, m)
    chunk = replace(chunk, mask=chunk_mask)
    kwargs = options(variant, num_q_heads)
    check(query, segments, chunk, **kwargs)
    check(query, segments, chunk, entry_mask=entry_mask, **kwargs)


@pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[4]], ids=str)
@pytest.mark.parametrize("parts", [2, 5])
def test_split(parts, variant, poisoned, monkeypatch):
    """Entries in several parts, some of them empty, and with masks some that a query sees nothing of."""
    monkeypatch.setattr(kernel, "parts_of", lambda *_: parts)
    query, segments, chunk = chunked(1, 2, [150, 33], 17, 20, 24, dim=16)
    chunk_mask, entry_mask = random_masks(1, [150, 33], 17, 20)
    check(query, segments, chunk, **options(variant, 2))
    check(query, segments, replace(chunk, mask=chunk_mask), entry_mask=entry_mask, **options(variant, 2))


@pytest.mark.parametrize("n", [1, 30])
def test_entry_masks_alone(n, poisoned):
    """Few queries with a mask of the entries come here too."""
    query, segments, chunk = chunked(1, 4, [70, 3], n, n, 16, dim=16)
    masks = [torch.rand(n, length, device=DEVICE) < 0.5 for length in (70, 3)]
    check(query, segments, entry_mask=masks)
    check(query, segments, chunk, entry_mask=masks)


def test_a_padded_prompt(poisoned):
    """The mask of a batch whose second row begins with padding: its first queries see nothing."""
    query, segments, chunk = chunked(2, 4, [0, 0, 0, 0], 50, 50, 16, dim=16)
    mask = torch.ones(2, 1, 50, 50, dtype=torch.bool).tril()
    mask[1, :, :, :21] = False
    check(query, segments, replace(chunk, mask=mask.to(DEVICE)))


@pytest.mark.parametrize("variant", VARIANTS[::2], ids=str)
def test_keys_and_values_of_one_arena(variant, poisoned):
    """Rows that are longer than a key or a value."""
    query, segments, chunk = chunked(1, 4, [70, 3], 40, 40, 24, dim=16)
    check(query, interleaved(segments), chunk, **options(variant, 4))


@pytest.mark.parametrize("shared", [False, True])
def test_strides(shared, poisoned):
    """Queries and chunks that are not contiguous, an arena inside a larger one, a mask that is transposed."""
    whole = arena([80, 5, 33, 0], 16, 16)
    segments = Segments(whole.keys[1:], whole.values[1:], whole.starts - 1, whole.lengths)
    query = torch.randn(2, 30, 4, 16, device=DEVICE).transpose(1, 2)
    key, value = (torch.randn(2, 40, 2, 16, device=DEVICE).transpose(1, 2) for _ in range(2))
    mask = torch.rand(1 if shared else 2, 1, 40, 30, device=DEVICE) < 0.7
    check(query, segments, Chunk(key, value))
    check(query, segments, Chunk(key, value, mask.transpose(2, 3)))


@pytest.mark.parametrize(("dim", "group"), [(8, 1), (40, 4), (64, 8), (80, 5)])
def test_head_dims_and_groups(dim, group, poisoned):
    check(*chunked(1, group, [45], 17, 17, dim, dim=dim))


@pytest.mark.parametrize("variant", VARIANTS[:3], ids=str)
def test_half_precision(variant, poisoned):
    check(*chunked(1, 8, [300, 70], 20, 20, 64, dim=64), dtype=torch.float16, **options(variant, 8))


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_any_scale(scale, poisoned):
    check(*chunked(1, 2, [70], 20, 20, 16, dim=16), scale=scale)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_tables_on_the_device(poisoned, monkeypatch):
    """Nothing is read back."""
    query, segments, chunk = chunked(1, 4, [70, 3], 20, 20, 16, dim=16)
    expected = oracle(query, segments, chunk)[0]
    segments = replace(segments, starts=segments.starts.to(DEVICE), lengths=segments.lengths.to(DEVICE))
    if DEVICE == "cpu":
        monkeypatch.setattr(torch.Tensor, "tolist", None)
        monkeypatch.setattr(torch.Tensor, "__bool__", None)
    else:
        ragged_attention(query, segments, chunk)  # compiles
        torch.cuda.set_sync_debug_mode("error")
    try:
        out = ragged_attention(query, segments, chunk, backend="triton")
    finally:
        if DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    monkeypatch.undo()
    assert (out.double() - expected).abs().max() <= 1e-5


def test_no_queries():
    query, segments, chunk = chunked(1, 4, [70, 3], 0, 0, 16, dim=16)
    mask = [torch.ones(0, 70, dtype=torch.bool), torch.ones(0, 3, dtype=torch.bool)]
    assert ragged_attention(query, segments, chunk, entry_mask=mask, backend="triton").shape == (1, 4, 0, 16)


def test_the_longest_segment_begins_first(monkeypatch):
    """Each segment's attention is where it belongs, whatever the order; and it is that of falling lengths."""
    orders, launch = [], kernel._attend_chunk_kernel
    place = launch.arg_names.index("order_ptr")

    class Spy:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: (orders.append(args[place].tolist()), launch[grid](*args, **kwargs))

    monkeypatch.setattr(kernel, "_attend_chunk_kernel", Spy())
    check(*chunked(2, 4, [3, 70, 0, 40], 20, 20, 16, dim=16))
    assert orders == [[1, 3, 0, 2]]


@pytest.mark.parametrize(
    ("programs", "entries", "wanted", "parts"),
    [
        (1024, 10_000, 528, 1),  # a chunk of 4096 queries fills the device
        (128, 10_000, 528, 4),
        (8, 100_000, 528, 64),
        (8, 1100, 528, 2),  # nothing is gained by less than 512 entries each
        (8, 0, 528, 1),
    ],
)
def test_parts(programs, entries, wanted, parts, monkeypatch):
    monkeypatch.setattr(kernel, "MOST_PARTS", 64)
    assert kernel.parts_of(programs, entries, wanted) == parts


@pytest.mark.skipif(INTERPRET, reason="a launch of the interpreter takes a second")
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_real_sizes(dtype, dim, poisoned):
    for group, n in ((1, 17), (4, 100), (8, 600), (3, 1500)):
        query, segments, chunk = chunked(2, 2 * group, [5000, 130, 0, 1024], n, n + 5, dim, dim=dim)
        check(query, segments, chunk, dtype)
        mask = torch.rand(2, 1, n, n + 5, device=DEVICE) < 0.9
        check(query, segments, replace(chunk, mask=mask), dtype, softcap=30.0)
