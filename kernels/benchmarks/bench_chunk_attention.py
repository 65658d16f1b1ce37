"""Attention of a chunk over a ragged cache, beside torch's flash SDPA over a dense one.

    python kernels/benchmarks/bench_chunk_attention.py --out kernels/benchmarks/results/chunk_attention_h200.csv

4096 queries of a chunk in bf16 over 32768 kept entries a KV head, equal and lognormal; then fewer queries, fewer
entries, other head dims, masks, a batch, and a first chunk without entries. FLOP/s count what is visible. The dense
equal has as many entries in every head and the same chunk; flash takes it as keys aligned at the end, causally. The
peak is what a square product in bf16 reaches in the same process. First calls compile, and are timed by the clock.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from basics import command_line, timed, write_csv
from bench_decode_attention import spread
from harness import cold_time, machine
from kvpolicy_kernels.attention import ragged_attention
from kvpolicy_kernels.segments import Chunk, Segments
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

NUM_KV_HEADS, GROUP = 8, 4
GOAL = 0.7  # of flash's FLOP/s, 4096 queries over 32768 entries


@dataclass(frozen=True)
class Case:
    """queries: of the chunk, which has as many tokens;  entries: mean of a KV head;  masked: by a causal bool tensor"""

    queries: int = 4096
    entries: int = 32768
    distribution: str = "lognormal"
    batch: int = 1
    dim: int = 128
    masked: bool = False

    @property
    def heads(self) -> int:
        return NUM_KV_HEADS * GROUP

    @property
    def flops(self) -> float:
        """Of two products of what is visible."""
        seen = self.queries * self.entries + self.queries * (self.queries + 1) / 2
        return 4.0 * self.batch * self.heads * seen * self.dim

    def inputs(self) -> tuple[Tensor, Segments, Chunk]:
        make = functools.partial(torch.randn, dtype=torch.bfloat16, device="cuda")
        count = self.batch * NUM_KV_HEADS
        lengths = torch.zeros(count, dtype=torch.int64)
        if self.entries:
            lengths = spread(self.distribution, count, count * self.entries, torch.Generator().manual_seed(0))
        keys, values = (make(max(int(lengths.sum()), 1), self.dim) for _ in range(2))
        segments = Segments(keys, values, (lengths.cumsum(0) - lengths).cuda(), lengths.cuda())
        key, value = (make(self.batch, NUM_KV_HEADS, self.queries, self.dim) for _ in range(2))
        mask = None
        if self.masked:
            mask = torch.ones(1, 1, self.queries, self.queries, dtype=torch.bool, device="cuda").tril()
        return make(self.batch, self.heads, self.queries, self.dim), segments, Chunk(key, value, mask)

    def dense(self) -> Callable[[], Tensor]:
        make = functools.partial(torch.randn, dtype=torch.bfloat16, device="cuda")
        total = self.entries + self.queries
        query = make(self.batch, self.heads, self.queries, self.dim)
        key, value = (make(self.batch, NUM_KV_HEADS, total, self.dim) for _ in range(2))
        bias = causal_lower_right(self.queries, total)

        def call() -> Tensor:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, enable_gqa=True)

        return call


CASES = (
    Case(distribution="uniform"), Case(), Case(distribution="skew"),
    Case(entries=9830), Case(entries=0), Case(entries=131072),
    Case(queries=2048, entries=9830), Case(queries=512, entries=9830), Case(queries=100, entries=9830),
    Case(queries=32, entries=9830), Case(batch=8, queries=1024, entries=9830),
    Case(dim=64), Case(dim=256), Case(masked=True),
)  # fmt: skip


def check(query: Tensor, segments: Segments, chunk: Chunk) -> None:
    """The last queries of every head against fp32 attention: the relative error must be that of bf16."""
    out = ragged_attention(query, segments, chunk, backend="triton")
    few = slice(max(query.shape[2] - 64, 0), None)
    for i, (start, length) in enumerate(segments.bounds()):
        b, h = divmod(i, NUM_KV_HEADS)
        rows, heads = slice(start, start + length), slice(h * GROUP, (h + 1) * GROUP)
        k = torch.cat([segments.keys[rows], chunk.key[b, h]]).float()
        v = torch.cat([segments.values[rows], chunk.value[b, h]]).float()
        q = query[b, heads, few].float()
        seen = torch.ones(query.shape[2], len(k), dtype=torch.bool, device="cuda").tril(length)[few]
        scores = (q @ k.T * query.shape[-1] ** -0.5).masked_fill_(~seen, -math.inf)
        right = torch.softmax(scores, -1) @ v
        assert (out[b, heads, few].float() - right).norm() <= 1e-2 * right.norm(), (i, length)


def product_peak() -> float:
    """FLOP/s of a product of two square matrices in bf16."""
    size = 8192
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return 2.0 * size**3 / cold_time([lambda: a @ b] * 4)[0]


def measure(case: Case, peak: float) -> dict[str, object]:
    query, segments, chunk = case.inputs()
    call = functools.partial(ragged_attention, query, segments, chunk, backend="triton")
    first, _ = timed(call)
    check(query, segments, chunk)
    # queries, keys and results of a chunk are many times the L2 cache, or read many times over: one set will do
    seconds, noise = cold_time([call] * 4)
    row: dict[str, object] = {
        "queries": case.queries, "entries": case.entries, "distribution": case.distribution, "batch": case.batch,
        "dim": case.dim, "masked": case.masked, "first_call_seconds": round(first, 2),
        "microseconds": round(seconds * 1e6, 1), "spread": round(noise, 3),
        "teraflops": round(case.flops / seconds * 1e-12, 1), "share_of_peak": round(case.flops / seconds / peak, 3),
    }  # fmt: skip
    try:
        dense, _ = cold_time([case.dense()] * 4)
        row |= {"flash_microseconds": round(dense * 1e6, 1), "flash_teraflops": round(case.flops / dense * 1e-12, 1)}
        row |= {"share_of_flash": round(dense / seconds, 3), "goal": GOAL if case in CASES[:2] else ""}
    except Exception as error:  # a peer that cannot run here is a row that says so
        row["flash_failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:80]
    return row | {"product_teraflops": round(peak * 1e-12, 1), **machine()}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--out", default="chunk_attention.csv")
    out = parser.parse_args().out
    torch.manual_seed(0)
    peak = product_peak()
    rows: list[dict[str, object]] = []
    for case in CASES:
        rows.append(measure(case, peak))
        print(rows[-1], flush=True)
        write_csv(out, rows)  # compiling takes seconds a case: what was measured is kept
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
