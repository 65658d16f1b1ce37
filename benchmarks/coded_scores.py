r"""Scores of a later chunk over int8 and int4 entries: from the codes, and from entries that are decoded first.

    python benchmarks/coded_scores.py --out benchmarks/results/coded_scores_h200.csv

A layer holds a prompt, all of it, and a chunk of 1024 tokens comes behind it: the last 32 of its queries score all that
is there, as SnapKV asks, or all of them, as H2O does. int4 has its exact copies, and keys of head dim 64 a centre of
eight waves, as of a model whose keys have a bias. "decoded first" is what a cache did before it read codes: the layer's
keys and values become numbers, and the kernel over 16 bits reads them. "model's dtype" is a layer of bf16 entries.

Checked first, at the shortest prompt, against fp32 over the decoded entries: at most twice the error of the way round
by 16 bits. Microseconds are those of a call that is waited for, the median of 15; megabytes what it takes at most.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from kvpolicy_kernels.column_scores import column_scores
from kvpolicy_kernels.formats import FORMATS, EntryFormat
from kvpolicy_kernels.key_centre import KeyCentre
from shared import command_line, machine, timed, write_csv
from torch import Tensor

from kvpolicy.cache.arena import LayerArena
from kvpolicy.cache.attention_mass import attention_mass
from kvpolicy.cache.chunk import Chunk
from kvpolicy.cache.encoded_arena import EncodedArena
from kvpolicy.model.layer_spec import LayerSpec

HEADS, SHAPES = 8, ((4, 128), (7, 64))  # query heads a group, head dim
LENGTHS, TOKENS, QUERIES = (4096, 8192, 16384, 32768), 1024, (32, 1024)
SINKS, WAVES, REPEATS, DEVICE = 4, 8, 15, "cuda"


def chunk_of(first: int, count: int, dim: int) -> Chunk:
    key, value = (torch.randn(1, HEADS, count, dim, device=DEVICE).bfloat16() for _ in range(2))
    return Chunk(key, value, torch.arange(first, first + count)[None])


def arena_of(prompt: Chunk, group: int, dim: int, entry_format: EntryFormat | None, centre: KeyCentre) -> LayerArena:
    """Holds every token of a prompt."""
    shape, device = LayerSpec("full", HEADS * group, HEADS, dim, dim), prompt.key.device
    arena: LayerArena
    if entry_format is None:
        arena = LayerArena(HEADS, dim, dim, torch.bfloat16, device, num_pinned=SINKS, scored=True)
    else:
        arena = EncodedArena(
            (1, HEADS), shape, torch.bfloat16, device,
            entry_format=entry_format, num_sinks=SINKS, num_pinned=SINKS, scored=True, key_centre=centre,
        )  # fmt: skip
    count = len(prompt)
    every = torch.arange(count, device=device).expand(HEADS, -1).contiguous()
    counts = torch.full((HEADS,), count)
    arena.replace(every, counts, counts, every, torch.zeros(HEADS, count, device=device), prompt)
    return arena


def check(arena: EncodedArena, query: Tensor, chunk: Chunk) -> float:
    """The error over that of the way round by 16 bits. Raises `AssertionError` above 2."""
    segments, copies = arena.read_segments
    chunk_in_single = Chunk(chunk.key.float(), chunk.value.float(), chunk.positions).masked(None)
    entries = segments.decoded(torch.float32, copies)
    exact = column_scores(query.float(), entries, chunk_in_single, backend="torch")
    found = attention_mass(arena, query, chunk, {})
    with mock.patch.object(EncodedArena, "reads_codes", False):
        plain = attention_mass(arena, query, chunk, {})
    error, allowed = (float((x - exact).abs().max()) for x in (found, plain))
    assert error <= 2 * allowed, (arena.entry_format, error, allowed)
    return error / allowed


def cost(call: Callable[[], object]) -> tuple[float, float]:
    """Microseconds, and megabytes that it takes at most."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    peak = (torch.cuda.max_memory_allocated() - before) / 1e6
    return statistics.median(timed(call)[0] for _ in range(REPEATS)) * 1e6, peak


def lines(group: int, dim: int, length: int) -> Iterator[dict[str, object]]:
    prompt, chunk = chunk_of(0, length, dim), chunk_of(length, TOKENS, dim)
    centre = KeyCentre(
        torch.randn(1 + 2 * WAVES, HEADS, dim, device=DEVICE),
        torch.randint(1, 2**29, (HEADS, WAVES), device=DEVICE, dtype=torch.int32),
    )
    queries = torch.randn(1, HEADS * group, TOKENS, dim, device=DEVICE).bfloat16()
    own = None if dim == 128 else centre
    for name, entry_format in {"model's dtype": None, **FORMATS}.items():
        arena = arena_of(prompt, group, dim, entry_format, own)
        for count in QUERIES:
            query = queries[:, :, -count:]

            def score(arena: LayerArena = arena, query: Tensor = query) -> Tensor:
                return attention_mass(arena, query, chunk, {})

            line = {"kv_heads": HEADS, "group": group, "dim": dim, "centre": own is not None and name in FORMATS,
                    "entries": length, "tokens": TOKENS, "queries": count, "format": name}  # fmt: skip
            if not isinstance(arena, EncodedArena):
                micros, peak = cost(score)
                yield line | {"way": "16 bits", "microseconds": round(micros, 1), "megabytes": round(peak, 1)}
                continue
            error = round(check(arena, query, chunk), 2) if length == LENGTHS[0] else ""
            with mock.patch.object(EncodedArena, "reads_codes", False):
                base, peak = cost(score)
            yield line | {"way": "decoded first", "microseconds": round(base, 1), "megabytes": round(peak, 1)}
            micros, peak = cost(score)
            yield line | {"way": "codes", "microseconds": round(micros, 1), "megabytes": round(peak, 1),
                          "of_decoded_first": round(micros / base, 3), "error_over_16_bits": error}  # fmt: skip


@torch.no_grad()
def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--out", required=True)
    out = parser.parse_args().out
    torch.manual_seed(0)
    rows = []
    for group, dim in SHAPES:
        for length in LENGTHS:
            for line in lines(group, dim, length):
                rows.append(line | machine(DEVICE, "torch", "triton"))
                print(*line.values(), sep="\t", flush=True)
    write_csv(out, rows)


if __name__ == "__main__":
    main()
