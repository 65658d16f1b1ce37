r"""Three cells of bench_decode_attention.py, and a kernel that only reads, for Nsight Compute to look at.

    ncu --clock-control none -k regex:'_attend|_merge|_read' --section SpeedOfLight --section MemoryWorkloadAnalysis \
        --section WarpStateStats --section Occupancy --section LaunchStats --csv --page details \
        python kernels/benchmarks/profile_decode_attention.py > ncu.csv
    python kernels/benchmarks/profile_decode_attention.py --condense ncu.csv --out decode_attention_profile.csv

Every kernel is launched twice; the profiler empties the caches before each. The second call writes one line a launch.
"""

from __future__ import annotations

import csv

import torch
from basics import command_line, write_csv
from bench_decode_attention import DIM, GROUP, NUM_KV_HEADS, POOL_ELEMENTS, Case, spread
from harness import _read_kernel, machine

CELLS = ((1, 32768), (1, 131072), (8, 8192))
READ_BYTES = 2**29
METRICS = {
    "Duration": "duration_ns", "Memory Throughput": "dram_bytes_per_second", "DRAM Throughput": "dram_percent",
    "SM Frequency": "sm_hertz", "Elapsed Cycles": "elapsed_cycles", "SM Active Cycles": "sm_active_cycles",
    "Compute (SM) Throughput": "compute_percent", "L2 Hit Rate": "l2_hit_percent",
    "Achieved Occupancy": "occupancy_percent", "Registers Per Thread": "registers",
    "Warp Cycles Per Issued Instruction": "warp_cycles_per_instruction",
}  # fmt: skip


def launch() -> None:
    pool = tuple(torch.empty(POOL_ELEMENTS, dtype=torch.bfloat16, device="cuda").normal_() for _ in range(2))
    for batch, mean in CELLS:
        segments = batch * NUM_KV_HEADS
        case = Case(pool, spread("uniform", segments, segments * mean, torch.Generator()), batch, GROUP, DIM)
        for call in case.ours()[:2]:
            call()
            torch.cuda.synchronize()
    block, programs = 4096, 264
    per_program = READ_BYTES // 4 // programs // block * block
    x = torch.randint(-(2**31), 2**31 - 1, (per_program * programs,), dtype=torch.int32, device="cuda")
    out = torch.empty(programs * block, dtype=torch.int32, device="cuda")
    for _ in range(2):
        _read_kernel[(programs,)](x, out, per_program, block)
        torch.cuda.synchronize()


def condense(source: str, out: str) -> None:
    """Keeps the metrics above. Throughput stands in the file twice; the one in bytes is kept."""
    with open(source, newline="") as file:
        lines = [line for line in csv.reader(file) if len(line) > 10]
    rows: dict[str, dict[str, object]] = {}
    for line in (dict(zip(lines[0], values, strict=False)) for values in lines[1:]):
        row = rows.setdefault(line["ID"], {"kernel": line["Kernel Name"], "grid": line["Grid Size"]})
        name = METRICS.get(line["Metric Name"])
        if name and not (line["Metric Name"] == "Memory Throughput" and line["Metric Unit"] == "%"):
            row[name] = line["Metric Value"].replace(",", "")
    write_csv(out, list(rows.values()))


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--condense", metavar="CSV")
    parser.add_argument("--out", default="decode_attention_profile.csv")
    options = parser.parse_args()
    if options.condense:
        condense(options.condense, options.out)
    else:
        print(machine())
        launch()


if __name__ == "__main__":
    main()
