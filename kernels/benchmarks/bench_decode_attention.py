"""Decode attention over segments of any length: time, share of the read limit, peers, and 200 random tables.

    python kernels/benchmarks/bench_decode_attention.py --out kernels/benchmarks/results/decode_attention_h200

writes OUT_cells.csv (the fifteen cells of batch x mean length x distribution, with peers), OUT_tables.csv (random
tables against uniform lengths of equal bytes) and OUT_parts.csv (small problems, plans, mass, drafts). An H200 takes
about two minutes.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from basics import command_line, write_csv
from harness import cold_time, copies_needed, copy_limit, machine, read_limit
from kvpolicy_kernels.attention import decode_attention, plan_work
from kvpolicy_kernels.segments import Chunk, Segments
from torch.nn.attention import SDPBackend, sdpa_kernel

CELLS = ((1, 32768), (8, 8192), (1, 131072), (64, 2048), (32, 8192))  # batch, mean entries of a KV head
GOALS = (0.68, 0.82, 0.90, 0.88, 0.93)  # share of the read limit
DISTRIBUTIONS = ("uniform", "skew", "lognormal")
NUM_KV_HEADS, GROUP, DIM = 8, 4, 128
POOL_ELEMENTS = 2**31  # of keys, and of values, in bf16: 4.3 GB each
LONGEST = 131072


def spread(kind: str, segments: int, total: int, generator: torch.Generator) -> torch.Tensor:
    """int64 [segments] with this sum. "skew": a tenth of the segments holds 82 % of the entries."""
    if kind == "uniform":
        weights = torch.ones(segments)
    elif kind == "skew":
        heavy = max(1, round(segments / 10))
        weights = torch.full((segments,), 0.18 / max(segments - heavy, 1))
        weights[torch.randperm(segments, generator=generator)[:heavy]] = 0.82 / heavy
    else:
        weights = torch.randn(segments, generator=generator).exp()
    lengths = (weights.double() / weights.sum() * total).long()
    lengths[lengths.argmax()] += total - lengths.sum()
    return lengths


class Case:
    """Segments in one arena, as often behind one another as a cold measurement needs."""

    def __init__(self, pool: tuple[torch.Tensor, torch.Tensor], lengths: torch.Tensor, batch: int, group: int, dim: int,
                 n: int = 1) -> None:  # fmt: skip
        self.lengths, self.batch, self.group, self.dim = lengths, batch, group, dim
        self.total = int(lengths.sum())
        self.nbytes = self.total * dim * 4
        rows = POOL_ELEMENTS // dim
        self.keys, self.values = (x[: rows * dim].view(rows, dim) for x in pool)
        self.copies = max(1, min(copies_needed(self.nbytes), rows // self.total))
        start = lengths.cumsum(0) - lengths
        self.starts = [(start + i * self.total).cuda() for i in range(self.copies)]
        self.on_device = lengths.cuda()
        heads = len(lengths) // batch * group
        self.query = torch.randn(batch, heads, n, dim, device="cuda").bfloat16()
        self.plan = plan_work(self.on_device, head_dim=dim)

    def ours(self, **options: object) -> list[Callable[[], object]]:
        segments = [Segments(self.keys, self.values, start, self.on_device) for start in self.starts]
        return [functools.partial(decode_attention, self.query, x, plan=self.plan, **options) for x in segments]

    def time(self, **options: object) -> float:
        return cold_time(self.ours(**options))[0]

    def check(self) -> None:
        """Each segment against fp32 attention; the largest relative error must be that of bf16."""
        out = self.ours()[0]().out.view(len(self.lengths), self.group, -1, self.dim).float()
        begin = 0
        for i, length in enumerate(self.lengths.tolist()):
            k, v = (x[begin : begin + length].float() for x in (self.keys, self.values))
            q = self.query.view(len(self.lengths), self.group, -1, self.dim)[i].float()
            right = torch.softmax(q @ k.T * self.dim**-0.5, -1) @ v
            assert length == 0 or (out[i] - right).norm() <= 1e-2 * right.norm(), (i, length)
            begin += length


def dense(case: Case, backend: SDPBackend) -> list[Callable[[], object]]:
    """Torch's SDPA over equally long segments, which it takes as a dense cache."""
    length = int(case.lengths[0])
    shape = (case.batch, NUM_KV_HEADS, length, DIM)
    calls = []
    for start in case.starts:
        rows = slice(int(start[0]), int(start[0]) + case.total)
        k, v = case.keys[rows].view(shape), case.values[rows].view(shape)

        def call(k: torch.Tensor = k, v: torch.Tensor = v) -> torch.Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(case.query, k, v, enable_gqa=True)

        calls.append(call)
    return calls


def varlen(case: Case) -> list[Callable[[], object]]:
    """FlashAttention 2 in torch, every KV head a sequence of one query whose heads are the group."""
    segments, longest = len(case.lengths), int(case.lengths.max())
    query = case.query.view(segments, GROUP, DIM)
    ends = F.pad(case.on_device.cumsum(0), (1, 0)).int()
    starts = torch.arange(segments + 1, dtype=torch.int32, device="cuda")
    calls = []
    for start in case.starts:
        rows = slice(int(start[0]), int(start[0]) + case.total)
        k, v = (x[rows].unsqueeze(1) for x in (case.keys, case.values))
        calls.append(
            functools.partial(
                torch.ops.aten._flash_attention_forward, query, k, v, starts, ends, 1, longest, 0.0, False, False
            )
        )
    return calls


def padded(case: Case) -> list[Callable[[], object]]:
    """What padding to the longest segment costs: SDPA with a mask. One set of arguments; it is far larger than L2."""
    longest = int(case.lengths.max())
    shape = (case.batch, NUM_KV_HEADS, longest, DIM)
    k, v = (x[: math.prod(shape) // DIM].view(shape) for x in (case.keys, case.values))
    mask = torch.arange(longest, device="cuda") < case.on_device.view(case.batch, NUM_KV_HEADS, 1, 1)
    mask = mask.repeat_interleave(GROUP, 1)
    return [lambda: F.scaled_dot_product_attention(case.query, k, v, attn_mask=mask, enable_gqa=True)] * 2


def peers(case: Case, kind: str) -> Iterator[tuple[str, Callable[[], list[Callable[[], object]]]]]:
    if kind == "uniform":
        yield "cudnn_sdpa", lambda: dense(case, SDPBackend.CUDNN_ATTENTION)
        yield "flash_sdpa", lambda: dense(case, SDPBackend.FLASH_ATTENTION)
    yield "flash_varlen", lambda: varlen(case)
    if case.batch * NUM_KV_HEADS * int(case.lengths.max()) * DIM <= POOL_ELEMENTS:
        yield "padded_sdpa", lambda: padded(case)


def cells(pool: tuple[torch.Tensor, torch.Tensor], limits: dict[str, float]) -> list[dict[str, object]]:
    rows = []
    for (batch, mean), goal in zip(CELLS, GOALS, strict=True):
        for kind in DISTRIBUTIONS:
            lengths = spread(kind, batch * NUM_KV_HEADS, batch * NUM_KV_HEADS * mean, torch.Generator().manual_seed(0))
            case = Case(pool, lengths, batch, GROUP, DIM)
            if case.total < 10**6:
                case.check()
            timed = {"kvpolicy": cold_time(case.ours())}
            why = {}
            for name, calls in peers(case, kind):
                try:
                    timed[name] = cold_time(calls())
                except Exception as error:  # a peer that cannot run here is a row that says so
                    timed[name], why[name] = (math.nan, math.nan), str(error).split("\n")[0][:80]
            for name, (seconds, noise) in timed.items():
                rate = case.nbytes / seconds
                rows.append(
                    {"batch": batch, "mean_length": mean, "distribution": kind, "megabytes": round(case.nbytes / 1e6),
                     "kernel": name, "microseconds": round(seconds * 1e6, 2), "spread": round(noise, 3),
                     "gigabytes_per_second": round(rate / 1e9), "share_of_read_limit": round(rate / limits["read"], 3),
                     "goal": goal if name == "kvpolicy" else "", "why_not": why.get(name, ""), **columns(limits)}
                )  # fmt: skip
                print(*list(rows[-1].values())[:9], sep="\t", flush=True)
    return rows


def random_lengths(segments: int, total: int, generator: torch.Generator) -> torch.Tensor:
    """One of five shapes of spread, at most `LONGEST`; some segments are empty."""
    kind = int(torch.randint(5, (1,), generator=generator))
    uniform = torch.rand(segments, generator=generator).clamp(min=1e-6)
    weights = (
        uniform, uniform**-0.7, (torch.randn(segments, generator=generator) * 1.5).exp(),
        torch.where(uniform < 0.1, 40.0, 1.0), torch.where(uniform < 0.5, 0.0, uniform),
    )[kind]  # fmt: skip
    if not bool(weights.any()):
        weights[0] = 1.0
    lengths = (weights.double() / weights.sum() * total).long().clamp(max=LONGEST)
    for i in torch.randperm(segments, generator=generator).tolist():  # what the clamp cut off
        missing = total - int(lengths.sum())
        lengths[i] += min(missing, LONGEST - int(lengths[i]))
    return lengths


def tables(pool: tuple[torch.Tensor, torch.Tensor], limits: dict[str, float], count: int) -> list[dict[str, object]]:
    """Random tables of 64 MB to 1 GB beside equal lengths of the same sum."""
    generator, rows = torch.Generator().manual_seed(1), []
    pick = lambda choices: choices[int(torch.randint(len(choices), (1,), generator=generator))]  # noqa: E731
    for index in range(count):
        group, dim = pick(range(1, 17)), pick((64, 80, 96, 128, 256))
        heads = pick((1, 2, 4, 8, 16))
        nbytes = 2 ** float(26 + 4 * torch.rand(1, generator=generator))
        total = max(int(nbytes / (4 * dim)), 2**26 // (4 * dim) + 1)
        least = -(-total // (LONGEST * heads))
        batch = max(least, pick((1, 2, 4, 8, 16, 32, 64)))
        segments = batch * heads
        case = Case(pool, random_lengths(segments, total, generator), batch, group, dim)
        even = Case(pool, spread("uniform", segments, case.total, generator), batch, group, dim)
        if index % 10 == 0:
            case.check()
        seconds, uniform = case.time(), even.time()
        rows.append(
            {"table": index, "segments": segments, "group": group, "dim": dim, "megabytes": round(case.nbytes / 1e6, 1),
             "shortest": int(case.lengths.min()), "longest": int(case.lengths.max()),
             "microseconds": round(seconds * 1e6, 2), "uniform_microseconds": round(uniform * 1e6, 2),
             "ratio": round(seconds / uniform, 4),
             "share_of_read_limit": round(case.nbytes / seconds / limits["read"], 3), **columns(limits)}
        )  # fmt: skip
    ratios = sorted(float(row["ratio"]) for row in rows)
    spread_of = {"median": statistics.median(ratios), "95 %": ratios[int(0.95 * count)], "worst": ratios[-1]}
    print(f"{count} tables, ratio to uniform:", spread_of, flush=True)
    return rows


def parts(pool: tuple[torch.Tensor, torch.Tensor], limits: dict[str, float]) -> list[dict[str, object]]:
    """What is not in the cells: small problems, the plan, mass, drafts, other head dims and groups."""
    rows = []

    def add(name: str, seconds: float, nbytes: int | str = "") -> None:
        share = "" if nbytes == "" else round(int(nbytes) / seconds / limits["read"], 3)
        rows.append({"what": name, "microseconds": round(seconds * 1e6, 2), "megabytes": "" if nbytes == "" else
                     round(int(nbytes) / 1e6, 1), "share_of_read_limit": share, **columns(limits)})  # fmt: skip
        print(*list(rows[-1].values())[:4], sep="\t", flush=True)

    for mean in (128, 1024, 8192):
        case = Case(pool, torch.full((NUM_KV_HEADS,), mean), 1, GROUP, DIM)
        add(f"1 x {mean}", case.time(), case.nbytes)
    for shape in ((8,), (32, 8), (32, 512)):
        lengths = torch.full(shape, 4096, device="cuda")
        add(f"plan {' x '.join(map(str, shape))}", cold_time([functools.partial(plan_work, lengths)] * 8)[0])
    base = Case(pool, torch.full((64,), 8192), 8, GROUP, DIM)
    add("8 x 8192", base.time(), base.nbytes)
    add("8 x 8192, with mass", base.time(with_mass=True), base.nbytes)
    for n in (2, 4, 8, 16):
        case = Case(pool, torch.full((64,), 8192), 8, GROUP, DIM, n)
        chunk = Chunk(*(torch.randn(8, NUM_KV_HEADS, n, DIM, device="cuda").bfloat16() for _ in range(2)))
        add(f"8 x 8192, {n} queries and their chunk", case.time(chunk=chunk), case.nbytes)
    for dim in (64, 80, 96, 256):
        case = Case(pool, torch.full((64,), 8192 * DIM // dim), 8, GROUP, dim)
        add(f"268 MB of head dim {dim}", case.time(), case.nbytes)
    for group in (1, 3, 5, 7, 8, 16):
        case = Case(pool, torch.full((64,), 8192), 8, group, DIM)
        add(f"8 x 8192, group {group}", case.time(), case.nbytes)
    add("8 x 8192, softcap", base.time(softcap=30.0), base.nbytes)
    return rows


def columns(limits: dict[str, float]) -> dict[str, object]:
    return {f"{name}_limit_gigabytes_per_second": round(rate / 1e9) for name, rate in limits.items()} | machine()


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--out", default="decode_attention")
    parser.add_argument("--tables", type=int, default=200)
    options = parser.parse_args()
    torch.manual_seed(0)
    limits = {"read": read_limit(), "copy": copy_limit()}
    print({name: f"{rate / 1e12:.3f} TB/s" for name, rate in limits.items()}, machine(), flush=True)
    pool = tuple(torch.empty(POOL_ELEMENTS, dtype=torch.bfloat16, device="cuda").normal_() for _ in range(2))
    write_csv(f"{options.out}_cells.csv", cells(pool, limits))
    write_csv(f"{options.out}_parts.csv", parts(pool, limits))
    write_csv(f"{options.out}_tables.csv", tables(pool, limits, options.tables))


if __name__ == "__main__":
    main()
