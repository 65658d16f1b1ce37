"""Moving the kept rows of 8 KV heads, 128 dims in bf16: from a chunk, from an arena, and in place.

python kernels/benchmarks/bench_compact.py --out kernels/benchmarks/results/compact_h200.csv

Bytes are those of the moved rows, read and written, without the tables. Out of place one arena moves; in place keys,
values, positions and scores do.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from basics import command_line, write_csv
from harness import beside_a_copy, copies_needed, copy_limit
from kvpolicy_kernels.compact import compact, compact_in_place
from torch import Tensor

HEADS, DIM, ROW = 8, 128, 256  # bytes a row
LENGTHS, KEPT = (32_768, 131_072), (0.3, 0.1)
Calls = list[Callable[[], object]]


def kept_columns(length: int, kept: float, skewed: bool) -> tuple[Tensor, Tensor]:
    """Ascending columns [heads, most] and counts; skewed means in proportion 1 : 2 : ... : 8."""
    share = torch.arange(1, HEADS + 1) / (HEADS + 1) * 2 if skewed else torch.ones(HEADS)
    counts = (share * kept * length).long()
    columns = torch.full((HEADS, int(counts.max())), -1)
    for head, count in enumerate(counts.tolist()):
        columns[head, :count] = torch.randperm(length)[:count].sort().values
    return columns.cuda(), counts.cuda()


def out_of_place(chunks: list[Tensor], length: int, columns: Tensor, counts: Tensor) -> dict[str, Calls]:
    """chunks: each [1, heads, length, dim]; an arena is the same memory as rows."""
    head, place = (torch.arange(columns.shape[1], device="cuda") < counts[:, None]).nonzero(as_tuple=True)
    rows = head * length + columns[head, place]
    out_rows = torch.arange(len(rows), device="cuda")
    by_head = rows.split(counts.tolist())
    outs = [torch.zeros(len(rows), DIM, dtype=torch.bfloat16, device="cuda") for _ in chunks]
    pairs = list(zip(outs, chunks, strict=True))
    arenas = [(out, chunk.view(-1, DIM)) for out, chunk in pairs]
    compact(outs[0], out_rows, chunks[0], rows, backend="triton")
    compact(outs[1], out_rows, arenas[1][1], rows, backend="triton")
    assert all(torch.equal(out, arena[rows]) for out, arena in arenas[:2])
    return {
        "compact, chunk": [lambda o=o, c=c: compact(o, out_rows, c, rows, backend="triton") for o, c in pairs],
        "compact, arena": [lambda o=o, a=a: compact(o, out_rows, a, rows, backend="triton") for o, a in arenas],
        "index_select": [lambda o=o, a=a: torch.index_select(a, 0, rows, out=o) for o, a in arenas],
        "index_select and index_copy_": [
            lambda o=o, a=a: compact(o, out_rows, a, rows, backend="torch") for o, a in arenas
        ],
        "index_select and cat": [
            lambda o=o, a=a: torch.cat([a.index_select(0, part) for part in by_head], out=o) for o, a in arenas
        ],
    }


def in_place(chunks: list[Tensor], length: int, columns: Tensor, counts: Tensor) -> dict[str, Calls]:
    """Over the chunks' memory, which is not the same afterwards."""
    starts = length * torch.arange(HEADS, device="cuda")
    wide = [chunk.view(-1, DIM) for chunk in chunks]
    narrow = [torch.zeros(len(wide[0]), dtype=dtype, device="cuda") for dtype in (torch.int32, torch.float32)]
    sets = [[*pair, *(x.clone() for x in narrow)] for pair in zip(wide[::2], wide[1::2], strict=True)]
    ours, theirs = ([arena.clone() for arena in sets[0]] for _ in range(2))
    for arenas, backend in ((ours, "triton"), (theirs, "torch")):
        compact_in_place(arenas, starts, columns, counts, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    head, place = (torch.arange(columns.shape[1], device="cuda") < counts[:, None]).nonzero(as_tuple=True)
    rows, source_rows = starts[head] + place, starts[head] + columns[head, place]
    torch_move = lambda arenas: [a.index_copy_(0, rows, a.index_select(0, source_rows)) for a in arenas]  # noqa: E731
    return {
        "compact_in_place": [lambda a=a: compact_in_place(a, starts, columns, counts, backend="triton") for a in sets],
        "index_select and index_copy_, in place": [lambda a=a: torch_move(a) for a in sets],
    }


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--out", required=True)
    out, limit, lines = parser.parse_args().out, copy_limit(), []
    for length in LENGTHS:
        num_sets = copies_needed(int(2 * HEADS * length * min(KEPT) * ROW))
        make = lambda n=length: torch.randn(1, HEADS, n, DIM, dtype=torch.bfloat16, device="cuda")  # noqa: E731
        chunks = [make() for _ in range(max(4, num_sets + num_sets % 2))]  # in place they are keys and values in turn
        for kept, skewed in product(KEPT, (False, True)):
            case = {"rows_per_head": length, "kept": kept, "heads": "skewed" if skewed else "uniform"}
            columns, counts = kept_columns(length, kept, skewed)
            moved = 2 * int(counts.sum())
            for moves, nbytes in ((out_of_place, moved * ROW), (in_place, moved * (2 * ROW + 4 + 4))):
                for name, calls in moves(chunks, length, columns, counts).items():
                    lines.append(case | {"implementation": name} | beside_a_copy(calls, nbytes, limit))
    write_csv(out, lines)


if __name__ == "__main__":
    main()
