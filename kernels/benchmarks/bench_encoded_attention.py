"""Decode attention over int8 and int4 entries beside the same entries in bf16, and what encoding a token costs.

    python kernels/benchmarks/bench_encoded_attention.py --out kernels/benchmarks/results/encoded_attention_h200.csv
    python kernels/benchmarks/bench_encoded_attention.py --launches --out kernels/benchmarks/results/launches_h200.csv
    python kernels/benchmarks/bench_encoded_attention.py --centres --out kernels/benchmarks/results/key_centres_h200.csv

Checked first, against fp32 over the decoded entries: at most twice the torch path's error. Megabytes are those of bf16;
the goals are 0.65 (int8) and 0.5 (int4) of its time from 268 MB on. "block" rows attend to an exact block of 36 tokens
besides, whose codes are hidden. "no entries" is what a call takes whatever the size. "encode" rows are one token of a
layer, keys and values, beside `append` alone.

`--launches` times tile sizes and numbers of programs instead, fastest first at the end, in about a minute and a half:
what `launch_config` and `encoded_programs` say is decided by its "entries and block" rows. `--centres` times what a
centre of the keys adds to int4, by its waves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import torch
from basics import command_line, write_csv
from bench_decode_attention import spread
from harness import cold_time, copies_needed, machine, read_limit
from kvpolicy_kernels.append import append
from kvpolicy_kernels.attention import WorkPlan, decode_attention, plan_work
from kvpolicy_kernels.attention.kernel import triton_plan
from kvpolicy_kernels.encode import encode
from kvpolicy_kernels.encoded_attention import encoded_attention, encoded_programs
from kvpolicy_kernels.encoded_attention import kernel as encoded_kernel
from kvpolicy_kernels.formats import FORMATS, EntryFormat
from kvpolicy_kernels.key_centre import KeyCentre
from kvpolicy_kernels.segments import Chunk, EncodedSegments, ExactCopies, Segments
from torch import Tensor

# batch, mean entries of a KV head, KV heads, group, head dim, distribution
CELLS = (
    (1, 32768, 8, 4, 128, "uniform"), (8, 8192, 8, 4, 128, "uniform"), (8, 8192, 8, 4, 128, "lognormal"),
    (1, 131072, 8, 4, 128, "uniform"), (64, 2048, 8, 4, 128, "uniform"), (32, 8192, 8, 4, 128, "uniform"),
    (8, 8192, 8, 1, 128, "uniform"), (8, 8192, 8, 8, 128, "uniform"), (32, 8192, 3, 3, 64, "uniform"),
    (8, 8192, 4, 2, 256, "uniform"),
)  # fmt: skip
GOALS = {"int8": 0.65, "int4": 0.5}
SINKS, BLOCK, PART = 4, 36, 2**16  # sinks and all tokens of the exact block;  rows encoded at a time
LAUNCHES = (  # BLOCK_N, STAGES, maxnreg
    (64, 3, None), (64, 3, 168), (64, 4, None), (64, 2, 168), (32, 3, None), (32, 3, 168), (32, 4, 128),
)  # fmt: skip
LAUNCH_CELLS = CELLS[1], CELLS[3]
PER_SM, UNITS = (4, 6, 8, 11, 16), (64, 128)  # programs of a multiprocessor;  entries of a unit
CENTRE_CELLS = CELLS[1], CELLS[3], (32, 8192, 2, 7, 64, "uniform")
PAIRS = 0, 2, 4, 8, 16
Calls = list[Callable[[], object]]


class Case:
    """The same entries in bf16 and in every format, as often behind one another as a cold measurement needs."""

    def __init__(self, batch: int, mean: int, heads: int, group: int, dim: int, kind: str) -> None:
        self.lengths = spread(kind, batch * heads, batch * heads * mean, torch.Generator().manual_seed(0)).cuda()
        self.total = int(self.lengths.sum())
        self.nbytes = self.total * dim * 4
        self.copies = copies_needed(self.nbytes // 4)  # for the smallest format
        self.rows = self.total * min(self.copies, max(2, 2**33 // self.nbytes))
        self.keys, self.values = (torch.randn(self.rows, dim, device="cuda").bfloat16() for _ in range(2))
        self.query = torch.randn(batch, heads * group, 1, dim, device="cuda").bfloat16()
        block = (torch.randn(batch, heads, BLOCK, dim, device="cuda").bfloat16() for _ in range(2))
        self.block = Chunk(*block, torch.ones(batch, 1, 1, BLOCK, dtype=torch.bool, device="cuda"))
        self.plan = plan_work(self.lengths, head_dim=dim)
        self.encoded_plan = plan_work(self.lengths, head_dim=dim, num_programs=encoded_programs(self.lengths.device))
        empty = torch.zeros_like(self.lengths)
        self.empty_plan = plan_work(empty, head_dim=dim, num_programs=encoded_programs(empty.device))
        first = self.lengths.cumsum(0) - self.lengths
        self.starts = [first + i * self.total for i in range(self.rows // self.total)]

    def copied(self, segments: EncodedSegments) -> tuple[EncodedSegments, ExactCopies]:
        """With copies of the first and the last entries of every segment, whose tokens lie in their order."""
        positions = torch.full((self.rows,), -1, dtype=torch.int32, device="cuda")
        last = int(self.lengths.max())  # where the last token of every segment is
        batch, starts = len(self.query), segments.starts
        for start, length in zip(starts.tolist(), self.lengths.tolist(), strict=True):
            own = torch.arange(last - length, last, device="cuda", dtype=torch.int32)
            own[:SINKS] = torch.arange(SINKS, device="cuda")[:length]
            positions[start : start + length] = own
        ring = torch.arange(last - BLOCK + SINKS, last, device="cuda", dtype=torch.int32)
        slots = torch.cat([torch.arange(SINKS, device="cuda", dtype=torch.int32), ring.roll(last % (BLOCK - SINKS))])
        copies = ExactCopies(self.block.key, self.block.value, slots.expand(batch, -1).contiguous(), SINKS)
        return replace(segments, positions=positions), copies

    def encoded(self, entry_format: EntryFormat) -> list[EncodedSegments]:
        columns = []
        for column in (self.keys, self.values):
            parts = [encode([part], entry_format, backend="triton")[0] for part in column.split(PART)]
            columns.append(type(parts[0])(*(torch.cat(tensors) for tensors in zip(*parts, strict=True))))
        return [EncodedSegments(*columns, starts, self.lengths, entry_format) for starts in self.starts]

    def emptied(self, segments: list[EncodedSegments]) -> list[EncodedSegments]:
        return [replace(x, lengths=torch.zeros_like(self.lengths)) for x in segments]

    def plain(self, chunk: Chunk | None) -> Calls:
        segments = [Segments(self.keys, self.values, starts, self.lengths) for starts in self.starts]
        return [functools.partial(decode_attention, self.query, x, chunk, plan=self.plan) for x in segments]

    def ours(self, segments: list[EncodedSegments], *, with_block: bool, plan: WorkPlan | None = None) -> Calls:
        run = functools.partial(encoded_attention, plan=plan or self.encoded_plan, backend="triton")
        pairs = [self.copied(x) if with_block else (x, None) for x in segments]
        return [functools.partial(run, self.query, x, copies=own) for x, own in pairs]

    def check(self, segments: EncodedSegments, chunk: Chunk | None) -> float:
        """The error over the torch path's, of the longest segment's sequence, with a chunk instead of a block.

        Raises `AssertionError` above 2.
        """
        heads = len(self.lengths) // len(self.query)
        b = int(self.lengths.argmax()) // heads
        mine = slice(b * heads, (b + 1) * heads)
        one = EncodedSegments(
            segments.keys, segments.values, segments.starts[mine], segments.lengths[mine], segments.entry_format
        )
        query = self.query[b : b + 1]
        if chunk is not None:
            chunk = Chunk(chunk.key[b : b + 1], chunk.value[b : b + 1])
        whole = chunk and Chunk(chunk.key.float(), chunk.value.float())
        # decoded segment by segment: the whole arena in fp32 would not fit
        exact, plain = (self.decoded(one, query.to(x), whole if x == torch.float32 else chunk)
                        for x in (torch.float32, torch.bfloat16))  # fmt: skip
        found = encoded_attention(query, one, chunk, backend="triton").out
        error, allowed = (float((x.float() - exact).abs().max()) for x in (found, plain))
        assert error <= 2 * allowed, (segments.entry_format, error, allowed)
        return error / allowed

    def decoded(self, segments: EncodedSegments, query: Tensor, chunk: Chunk | None) -> Tensor:
        out, heads = [], len(segments)
        group = query.shape[1] // heads
        for h, (start, length) in enumerate(zip(segments.starts.tolist(), segments.lengths.tolist(), strict=True)):
            rows = slice(start, start + length)
            keys, values = (
                segments.entry_format.decode(type(x)(x.codes[rows], x.scales[rows]), query.dtype)
                for x in (segments.keys, segments.values)
            )
            table = torch.tensor([0]), torch.tensor([length])
            own = chunk and Chunk(chunk.key[:, h : h + 1], chunk.value[:, h : h + 1])
            part = query[:, h * group : (h + 1) * group]
            out.append(decode_attention(part, Segments(keys, values, *table), own, backend="torch").out)
        return torch.cat(out, 1)


def attention_lines(limit: float) -> list[dict[str, object]]:
    lines = []
    for batch, mean, heads, group, dim, kind in CELLS:
        case = Case(batch, mean, heads, group, dim, kind)
        for what, chunk in (("entries", None), ("entries and block", case.block)):
            base, noise = cold_time(case.plain(chunk))
            timed = {"bf16": (base, noise, case.nbytes, 0.0)}
            for name, entry_format in FORMATS.items():
                segments = case.encoded(entry_format)
                error = case.check(segments[0], chunk)
                nbytes, with_block = 2 * case.total * entry_format.row_bytes(dim), chunk is not None
                timed[name] = *cold_time(case.ours(segments, with_block=with_block)), nbytes, error
                none = case.ours(case.emptied(segments), with_block=with_block, plan=case.empty_plan)
                timed[f"{name}, no entries"] = *cold_time(none), 0, 0.0
            for name, (seconds, noise, nbytes, error) in timed.items():
                name, _, without = name.partition(", ")
                lines.append(
                    {"batch": batch, "mean_length": mean, "kv_heads": heads, "group": group, "dim": dim,
                     "distribution": kind, "megabytes": round(case.nbytes / 1e6),
                     "what": what.replace("entries", without or "entries"), "format": name,
                     "microseconds": round(seconds * 1e6, 2), "spread": round(noise, 3),
                     "of_bf16": round(seconds / base, 3), "goal": GOALS.get(name, ""),
                     "share_of_read_limit": round(nbytes / seconds / limit, 3),
                     "error_over_torch": round(error, 2), "read_limit_gigabytes_per_second": round(limit / 1e9),
                     **machine()}
                )  # fmt: skip
                print(*list(lines[-1].values())[:15], sep="\t", flush=True)
        del case
    return lines


def launch_lines() -> list[dict[str, object]]:
    """Tile sizes, then numbers of programs and units at the default tile size."""
    lines: list[dict[str, object]] = []
    device = torch.device("cuda")
    for cell in LAUNCH_CELLS:
        case, per_sm = Case(*cell), encoded_programs(device) // multiprocessors()
        base, _ = cold_time(case.plain(None))
        for name, entry_format in FORMATS.items():
            segments = case.encoded(entry_format)
            default = encoded_kernel.launch_config(torch.bfloat16, cell[4], entry_format.codes_in_word, cell[3])
            own = default["BLOCK_N"], default["STAGES"], default.get("maxnreg")
            none = case.emptied(segments)
            tiles = [(x, per_sm, 128) for x in LAUNCHES if x == own or name == "int4" or x[0] < 64]
            programs = [(own, count, unit) for count in PER_SM for unit in UNITS]
            most = [(LAUNCHES[1], 11, 64), (LAUNCHES[5], 12, 64)]
            for what, tile, count, unit, these in (
                ("no entries", own, per_sm, 128, none),
                *(("entries and block", *x, segments) for x in dict.fromkeys([*tiles, *programs, *most])),
            ):
                lengths = these[0].lengths
                plan = triton_plan(lengths, count * multiprocessors(), unit)
                line = {
                    "what": what, "format": name, "megabytes": round(case.nbytes / 1e6), "block_n": tile[0],
                    "stages": tile[1], "maxnreg": tile[2] or "", "per_sm": count, "unit": unit,
                    **timed_launch(case.ours(these, with_block=these is segments, plan=plan), tile, default),
                }  # fmt: skip
                line["of_bf16"] = "" if "error" in line else round(float(str(line["microseconds"])) / base / 1e6, 3)
                lines.append(line | machine())
                print(*list(line.values()), sep="\t", flush=True)
        del case
    ran = [x for x in lines if x["what"] != "no entries" and "error" not in x]
    print("fastest:")
    for line in sorted(ran, key=lambda x: (x["format"], x["megabytes"], x["of_bf16"])):
        print(*list(line.values())[:11], sep="\t")
    return lines


def centre_lines() -> list[dict[str, object]]:
    lines: list[dict[str, object]] = []
    for cell in CENTRE_CELLS:
        case, (_, _, heads, _, dim, _) = Case(*cell), cell
        plain = case.encoded(FORMATS["int4"])
        base, noise = cold_time(case.ours(plain, with_block=True))
        timed: dict[object, tuple[float, float]] = {"no centre": (base, noise)}
        for count in PAIRS:
            centre = KeyCentre(
                torch.randn(1 + 2 * count, heads, dim, device="cuda"),
                torch.randint(1, 2**29, (heads, count), device="cuda", dtype=torch.int32),
            )
            timed[count] = cold_time(case.ours([replace(x, key_centre=centre) for x in plain], with_block=True))
        for name, (seconds, noise) in timed.items():
            lines.append(
                {"batch": cell[0], "mean_length": cell[1], "kv_heads": heads, "group": cell[3], "dim": dim,
                 "megabytes": round(case.nbytes / 1e6), "pairs": name, "microseconds": round(seconds * 1e6, 2),
                 "spread": round(noise, 3), "of_no_centre": round(seconds / base, 3), **machine()}
            )  # fmt: skip
            print(*list(lines[-1].values())[:10], sep="\t", flush=True)
        del case, plain
    return lines


def timed_launch(calls: Calls, tile: tuple[int, int, int | None], default: dict[str, int]) -> dict[str, object]:
    """Microseconds under a tile size, or what went wrong."""
    config = {name: x for name, x in default.items() if name != "maxnreg"} | {"BLOCK_N": tile[0], "STAGES": tile[1]}
    config |= {} if tile[2] is None else {"maxnreg": tile[2]}
    with mock.patch.object(encoded_kernel, "launch_config", lambda *arguments: config):
        try:
            seconds, noise = cold_time(calls)
        except Exception as error:  # a launch that the device refuses is a row of its own
            return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    return {"microseconds": round(seconds * 1e6, 2), "spread": round(noise, 3)}


def multiprocessors() -> int:
    count: int = torch.cuda.get_device_properties(0).multi_processor_count
    return count


def encode_lines() -> list[dict[str, object]]:
    """A token of one layer: its rows are encoded, and all columns written to their rows."""
    lines = []
    for segments in (8, 64, 512):
        keys, values = (torch.randn(1, segments, 1, 128, device="cuda").bfloat16() for _ in range(2))
        places = torch.arange(segments, device="cuda") * 64
        arenas = [torch.zeros(segments * 64, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2)]

        def plain(rows: list[Tensor], into: list[Tensor], at: Tensor = places) -> None:
            append(into, at, rows)

        timed = {"bf16": cold_time([functools.partial(plain, [keys, values], arenas)] * 8)}
        for name, entry_format in FORMATS.items():
            coded = [column for arena in arenas for column in entry_format.encode(arena)]

            def both(entry_format: EntryFormat = entry_format, coded: list[Tensor] = coded, keys: Tensor = keys,
                     values: Tensor = values) -> None:  # fmt: skip
                pairs = encode([keys, values], entry_format, backend="triton")
                plain([column for pair in pairs for column in pair], coded)

            timed[name] = cold_time([both] * 8)
        lines += [
            {"what": "encode and append", "batch": segments // 8, "kv_heads": 8, "dim": 128, "format": name,
             "microseconds": round(seconds * 1e6, 2), "spread": round(noise, 3), **machine()}
            for name, (seconds, noise) in timed.items()
        ]  # fmt: skip
        print(*[list(line.values())[:7] for line in lines[-3:]], sep="\n", flush=True)
    return lines


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--out", required=True)
    parser.add_argument("--launches", action="store_true", help="tile sizes and numbers of programs instead")
    parser.add_argument("--centres", action="store_true", help="key centres instead")
    options = parser.parse_args()
    out = options.out
    torch.manual_seed(0)
    if options.launches or options.centres:
        write_csv(out, launch_lines() if options.launches else centre_lines())
        return
    lines = attention_lines(read_limit())
    write_csv(out, [*lines, *encode_lines()])


if __name__ == "__main__":
    main()
