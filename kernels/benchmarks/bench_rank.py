"""Positions and keys of all candidates of a selection: scored entries, and the tokens of a chunk behind them.

python kernels/benchmarks/bench_rank.py --out kernels/benchmarks/results/rank_h200.csv

Bytes are those of scores and positions, read once, and of what is written. `torch` is the definition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from basics import command_line, write_csv
from harness import beside_a_copy, copies_needed, copy_limit
from kvpolicy_kernels.evict import rank

SHAPES = ((2, 0, 4096), (2, 1024, 64), (8, 0, 131_072), (8, 32_768, 64))  # segments, entries of each, new tokens
PROTECTION = {"num_sink_tokens": 4, "recent_window": 32}


def arguments(segments: int, length: int, tokens: int) -> dict[str, Any]:
    starts, lengths = length * torch.arange(segments, device="cuda"), torch.full((segments,), length, device="cuda")
    positions = torch.rand(segments, 2 * length, device="cuda").argsort(1)[:, :length].flatten().int()
    scores = torch.rand(segments, length + tokens, device="cuda")
    fresh = torch.arange(2 * length, 2 * length + tokens, device="cuda")[None]
    tables = {"positions": positions, "starts": starts, "lengths": lengths, "seen": fresh[:, -1] + 1}
    return {"scores": scores, **tables, "width": length, "fresh": fresh, **PROTECTION}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--out", required=True)
    out, limit, lines = parser.parse_args().out, copy_limit(), []
    for segments, length, tokens in SHAPES:
        nbytes = segments * ((length + tokens) * (4 + 8 + 8) + length * 4) + tokens * 8
        sets = [arguments(segments, length, tokens) for _ in range(min(32, copies_needed(nbytes)))]
        ours, theirs = (rank(**sets[0], backend=backend) for backend in ("triton", "torch"))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        for backend in ("triton", "torch"):
            calls: list[Callable[[], object]] = [
                lambda s=one, b=backend: rank(**s, backend=b)  # type: ignore[misc]
                for one in sets
            ]
            row = {"implementation": backend, "segments": segments, "entries": length, "tokens": tokens}
            lines.append(row | beside_a_copy(calls, nbytes, limit))
    write_csv(out, lines)


if __name__ == "__main__":
    main()
