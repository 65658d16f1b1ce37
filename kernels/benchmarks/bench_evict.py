"""Looking for the worst entry of each segment: a score and a position an entry.

python kernels/benchmarks/bench_evict.py --out kernels/benchmarks/results/evict_h200.csv

Bytes are those of the scores and positions, read once. `torch` is the definition over segments of one length that lie
behind each other, so that it has no rows to gather and no length to ask the device for. At most `SETS` sets of tables
take turns, so that those of short segments are found in the L2 cache.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from basics import command_line, write_csv
from harness import beside_a_copy, copies_needed, copy_limit
from kvpolicy_kernels.evict import evict
from kvpolicy_kernels.evict.reference import ranking, worst
from torch import Tensor

SHAPES = ((8, 1024), (8, 10_000), (8, 40_000), (64, 10_000), (512, 2048))  # segments, entries of each
SETS = 64
PROTECTION = {"num_sink_tokens": 4, "recent_window": 32, "spans": ()}
Calls = list[Callable[[], object]]


def new_tables(num_segments: int, length: int) -> list[Tensor]:
    """Scores, positions, starts, lengths and tokens seen."""
    scores = torch.rand(num_segments * length, device="cuda")
    positions = torch.rand(num_segments, 2 * length, device="cuda").argsort(1)[:, :length].flatten().int()
    starts = length * torch.arange(num_segments, device="cuda")
    return [scores, positions, starts, torch.full_like(starts, length), torch.full_like(starts, 2 * length)]


def by_torch(scores: Tensor, positions: Tensor, starts: Tensor, seen: Tensor) -> Tensor:
    shape = len(starts), -1
    return worst(ranking(scores.view(shape), positions.long().view(shape), seen[:, None], **PROTECTION))


def check(num_segments: int, length: int) -> None:
    """Raises `AssertionError` where the backends differ, also over segments of many lengths."""
    scores, positions, starts, lengths, seen = new_tables(num_segments, length)
    for each in (lengths, torch.randint_like(lengths, length), torch.zeros_like(lengths)):
        tables = scores, positions, starts, each, seen
        ours, theirs = (evict(*tables, **PROTECTION, backend=backend) for backend in ("triton", "torch"))
        assert torch.equal(ours, theirs)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--out", required=True)
    out, limit, lines = parser.parse_args().out, copy_limit(), []
    for num_segments, length in SHAPES:
        check(num_segments, length)
        nbytes = num_segments * length * (4 + 4)
        ours: Calls = []
        theirs: Calls = []
        for _ in range(min(SETS, copies_needed(nbytes))):
            tables = new_tables(num_segments, length)
            ours.append(lambda t=tables: evict(*t, **PROTECTION, backend="triton"))
            theirs.append(lambda t=tables: by_torch(*t[:3], t[4]))
        for name, each in (("evict", ours), ("torch", theirs)):
            row = {"implementation": name, "segments": num_segments, "length": length}
            lines.append(row | beside_a_copy(each, nbytes, limit))
    write_csv(out, lines)


if __name__ == "__main__":
    main()
