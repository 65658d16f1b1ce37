"""Attention of a chunk over int8 and int4 entries, beside decoding them first and beside entries in bf16.

    python kernels/benchmarks/bench_encoded_chunk.py --out kernels/benchmarks/results/encoded_chunk_h200.csv

Eight KV heads, which all have as many entries; int4 has an exact block of 36 tokens, whose codes are hidden. "decoded"
is what a cache did for every chunk before the kernel: whole columns are decoded by torch, the copies put in their
places, and the kernel over 16 bits attends to them. Megabytes are what a call takes at its height besides its arguments
and its result. What both give must agree to bf16. First calls compile, and are not timed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from basics import command_line, write_csv
from harness import cold_time, copies_needed, machine
from kvpolicy_kernels.attention import ragged_attention
from kvpolicy_kernels.encode import encode
from kvpolicy_kernels.encoded_attention import encoded_attention
from kvpolicy_kernels.formats import FORMATS, Encoded, EntryFormat
from kvpolicy_kernels.segments import Chunk, EncodedSegments, ExactCopies, Segments
from torch import Tensor

HEADS = 8
SINKS, BLOCK = 4, 36  # sinks and all tokens of the exact block
SHAPES = ((128, 4), (64, 7))  # head dim, group
ENTRIES, QUERIES = (4096, 32768), (8, 32, 128, 1024)
MOST_SETS = 24  # of arguments; with fewer bytes than the L2 cache holds they would be found there


@dataclass(frozen=True)
class Case:
    dim: int
    group: int
    entries: int
    queries: int

    def make(self, *shape: int) -> Tensor:
        return torch.randn(*shape, self.dim, dtype=torch.bfloat16, device="cuda")

    def tables(self) -> tuple[Tensor, Tensor]:
        lengths = torch.full((HEADS,), self.entries, device="cuda")
        return lengths.cumsum(0) - lengths, lengths

    def copies(self) -> ExactCopies:
        """Of the first tokens and of the last: entries lie in the order of their tokens."""
        slots = torch.arange(BLOCK, device="cuda", dtype=torch.int32)
        last = torch.arange(self.entries - BLOCK + SINKS, self.entries, device="cuda", dtype=torch.int32)
        slots[SINKS + last.long() % (BLOCK - SINKS)] = last
        return ExactCopies(self.make(1, HEADS, BLOCK), self.make(1, HEADS, BLOCK), slots[None], SINKS)


def decoded(segments: EncodedSegments, copies: ExactCopies | None) -> Segments:
    """As a cache reads its columns, without a word from the device."""
    own, positions = segments.entry_format, segments.positions
    keys, values = (own.decode(column, torch.bfloat16) for column in (segments.keys, segments.values))
    if copies is not None:
        assert positions is not None
        slots, heads = copies.slots(positions.long()), torch.arange(len(keys), device="cuda") // (len(keys) // HEADS)
        is_here = (copies.positions[0, slots] == positions)[:, None]
        keys, values = (
            torch.where(is_here, copied[0, heads, slots], column)
            for copied, column in ((copies.key, keys), (copies.value, values))
        )
    return Segments(keys, values, segments.starts, segments.lengths)


def taken(call: functools.partial[Tensor]) -> float:
    """Megabytes at the height of a call, without its result."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before - out.nbytes) / 1e6


def measure(case: Case, name: str, entry_format: EntryFormat) -> dict[str, object]:
    rows = HEADS * case.entries
    pair = encode([case.make(rows), case.make(rows)], entry_format, backend="triton")
    positions = torch.arange(case.entries, device="cuda", dtype=torch.int32).repeat(HEADS)
    copies = case.copies() if entry_format.exact_recent else None
    query = case.make(1, HEADS * case.group, case.queries)
    chunk = Chunk(case.make(1, HEADS, case.queries), case.make(1, HEADS, case.queries))
    count, tables = copies_needed(sum(x.nbytes for column in pair for x in column)), case.tables()
    columns = [[Encoded(*(x.clone() for x in column)) for column in pair] for _ in range(min(MOST_SETS, count))]
    sets = [EncodedSegments(*own, *tables, entry_format, positions) for own in columns]
    plain = decoded(sets[0], copies)
    pairs = [Segments(plain.keys.clone(), plain.values.clone(), plain.starts, plain.lengths) for _ in sets[:12]]

    def first_decoded(segments: EncodedSegments) -> Tensor:
        return ragged_attention(query, decoded(segments, copies), chunk, backend="triton")

    def codes(segments: EncodedSegments) -> Tensor:
        return encoded_attention(query, segments, chunk, copies=copies, backend="triton").out

    calls = {
        "bf16": [functools.partial(ragged_attention, query, x, chunk, backend="triton") for x in pairs],
        "decoded": [functools.partial(first_decoded, x) for x in sets],
        "codes": [functools.partial(codes, x) for x in sets],
    }
    found, right = calls["codes"][0](), calls["decoded"][0]()
    assert (found - right).float().norm() <= 2e-2 * right.float().norm(), (case, name)
    row: dict[str, object] = {
        "dim": case.dim, "group": case.group, "entries": case.entries, "queries": case.queries, "format": name,
    }  # fmt: skip
    seconds = {}
    for what, own in calls.items():
        seconds[what], noise = cold_time(own, repeats=9)
        row |= {f"{what}_us": round(seconds[what] * 1e6, 1), f"{what}_spread": round(noise, 3)}
        row[f"{what}_mb"] = round(taken(own[0]), 1)
    row["codes_over_decoded"] = round(seconds["codes"] / seconds["decoded"], 3)
    return row | {"codes_over_bf16": round(seconds["codes"] / seconds["bf16"], 3), **machine()}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--out", required=True)
    out = parser.parse_args().out
    torch.manual_seed(0)
    rows: list[dict[str, object]] = []
    for dim, group in SHAPES:
        for name, entry_format in FORMATS.items():
            for case in (Case(dim, group, entries, queries) for entries in ENTRIES for queries in QUERIES):
                rows.append(measure(case, name, entry_format))
                print(*list(rows[-1].values())[:-3], flush=True)
                write_csv(out, rows)  # what was measured is kept
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
