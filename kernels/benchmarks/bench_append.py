"""Appending one entry per segment: bf16 keys and values of 128 dims, positions and scores.

python kernels/benchmarks/bench_append.py --out kernels/benchmarks/results/append_h200.csv

Bytes are those of the entries, read and written. `cat` is what a cache without arenas does with keys and values of
`LENGTH` tokens; its bytes are those of the whole cache.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from basics import command_line, write_csv
from harness import beside_a_copy, copies_needed, copy_limit
from kvpolicy_kernels.append import append
from torch import Tensor

SEGMENTS = (8, 64, 512)
LENGTH, DIM = 1024, 128
SETS = 64  # calls over different rows and entries
Calls = list[Callable[[], object]]


def new_arenas(num_segments: int) -> list[Tensor]:
    """Keys, values, positions and scores of segments of `LENGTH` rows."""
    num_rows = num_segments * LENGTH
    wide = [torch.zeros(num_rows, DIM, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    return [*wide, *(torch.zeros(num_rows, dtype=dtype, device="cuda") for dtype in (torch.int32, torch.float32))]


def new_entries(num_segments: int) -> list[Tensor]:
    wide = [torch.randn(1, num_segments, 1, DIM, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    return [*wide, torch.randint(2**20, (num_segments,), device="cuda"), torch.rand(num_segments, device="cuda")]


def check(num_segments: int) -> None:
    """Raises `AssertionError` where the backends differ."""
    entries, rows = new_entries(num_segments), torch.randperm(num_segments * LENGTH, device="cuda")[:num_segments]
    ours, theirs = new_arenas(num_segments), new_arenas(num_segments)
    append(ours, rows, entries, backend="triton")
    append(theirs, rows, entries, backend="torch")
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def calls(num_segments: int) -> dict[str, Calls]:
    """The implementations, each over `SETS` sets of rows and entries."""
    arenas = new_arenas(num_segments)
    implementations: dict[str, Calls] = {name: [] for name in ("append", "index_copy_")}
    for _ in range(SETS):
        entries, rows = new_entries(num_segments), torch.randperm(len(arenas[0]), device="cuda")[:num_segments]
        implementations["append"].append(lambda r=rows, e=entries: append(arenas, r, e, backend="triton"))
        implementations["index_copy_"].append(lambda r=rows, e=entries: append(arenas, r, e, backend="torch"))
    return implementations


def cat_calls(num_segments: int) -> Calls:
    keys, values = new_entries(num_segments)[:2]
    shape = (2, 1, num_segments, LENGTH, DIM)
    nbytes = 2 * num_segments * LENGTH * DIM * 2
    caches = [torch.zeros(shape, dtype=torch.bfloat16, device="cuda") for _ in range(copies_needed(nbytes))]
    return [lambda c=c: (torch.cat([c[0], keys], 2), torch.cat([c[1], values], 2)) for c in caches]


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--out", required=True)
    out, limit, lines = parser.parse_args().out, copy_limit(), []
    for num_segments in SEGMENTS:
        check(num_segments)
        nbytes = 2 * num_segments * (2 * DIM * 2 + 4 + 4)
        whole = 2 * 2 * num_segments * (LENGTH + 1) * DIM * 2
        cases = [(name, runs, nbytes) for name, runs in calls(num_segments).items()]
        for name, runs, moved in [*cases, ("cat", cat_calls(num_segments), whole)]:
            row = {"implementation": name, "segments": num_segments}
            lines.append(row | beside_a_copy(runs, moved, limit))
    write_csv(out, lines)


if __name__ == "__main__":
    main()
