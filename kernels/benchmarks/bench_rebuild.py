"""A layer's new arena of what is kept: 2 or 8 KV heads in bf16, keys and values with positions and scores.

python kernels/benchmarks/bench_rebuild.py --out kernels/benchmarks/results/rebuild_h200.csv

`prompt` keeps 25 % of a chunk; `later` 25 % of a chunk of 64 tokens beside the entries of a prompt. Bytes are those of
the rows that are kept, read and written, without the tables. `torch` is the definition, which waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from basics import command_line, write_csv
from harness import beside_a_copy, copies_needed, copy_limit
from kvpolicy_kernels.rebuild import rebuild
from kvpolicy_kernels.rebuild.op import Chosen
from torch import Tensor

SHAPES = ((2, 64, 4096), (8, 128, 4096), (8, 128, 131_072))  # KV heads, dim, tokens of a prompt
KEPT, LATER = 4, 64
Case = tuple[list[Tensor], Chosen, list[Tensor] | None, list[Tensor], list[tuple[Tensor, Tensor]]]


def new_case(heads: int, dim: int, tokens: int, later: bool) -> Case:
    """The arguments of `rebuild`."""
    width, fresh = (tokens // KEPT, LATER) if later else (0, tokens)
    counts = width + fresh // KEPT
    columns = torch.rand(heads, width + fresh, device="cuda").argsort(1)[:, :counts].sort(1).values
    starts, former = (size * torch.arange(heads, device="cuda") for size in (counts, width))
    make = lambda *shape: torch.randn(*shape, dim, dtype=torch.bfloat16, device="cuda")  # noqa: E731
    outs, chunk = [make(heads * counts) for _ in range(2)], [make(1, heads, fresh) for _ in range(2)]
    held = [make(heads * width) for _ in range(2)] if later else None
    table = torch.randn(heads, width + fresh, device="cuda")
    numbers = [
        (torch.zeros(heads * counts, dtype=torch.int32, device="cuda"), (1000 * table).long()),
        (torch.zeros(heads * counts, device="cuda"), table),
    ]
    return outs, Chosen(columns, starts, torch.full_like(starts, counts), former, width), held, chunk, numbers


def check(case: Case) -> None:
    """Raises `AssertionError` where the backends differ."""
    outs, chosen, held, chunk, numbers = case
    made = []
    for backend in ("triton", "torch"):
        written = [torch.full_like(out, 3) for out in (*outs, *(out for out, _ in numbers))]
        tables = zip(written[2:], (table for _, table in numbers), strict=True)
        rebuild(written[:2], chosen, held, chunk, [*tables], backend=backend)  # type: ignore[arg-type]
        made.append(written)
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--out", required=True)
    out, limit, lines = parser.parse_args().out, copy_limit(), []
    for heads, dim, tokens in SHAPES:
        for later in (False, True):
            check(new_case(heads, dim, tokens, later))
            kept = heads * (tokens // KEPT + (LATER // KEPT if later else 0))
            nbytes = 2 * kept * (4 * dim + 4 + 4)
            cases = [new_case(heads, dim, tokens, later) for _ in range(min(16, copies_needed(nbytes)))]
            for backend in ("triton", "torch"):
                calls: list[Callable[[], object]] = [
                    lambda c=case, b=backend: rebuild(*c, backend=b)  # type: ignore[misc]
                    for case in cases
                ]
                row = {"heads": heads, "dim": dim, "tokens": tokens, "chunk": "later" if later else "prompt"}
                lines.append(row | {"implementation": backend} | beside_a_copy(calls, nbytes, limit))
    write_csv(out, lines)


if __name__ == "__main__":
    main()
