"""What every kernel benchmark shares: medians over a cold L2, and the ceilings of the device.

A call is timed in a CUDA graph that runs it over several sets of arguments in turn, together larger than the L2 cache,
so that no call finds its own data there and no launch waits for Python.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl

COLD_BYTES = 400_000_000  # at least, between two calls over one set of arguments; an H200 has 60 MB of L2
WARM_SECONDS = 0.05  # of replays before the first one that counts: clocks fall while Python and compilers work


def copies_needed(nbytes: int) -> int:
    """Sets of arguments, of so many bytes each, that a cold measurement rotates over."""
    return max(2, -(-COLD_BYTES // max(nbytes, 1)))


def cold_time(calls: Sequence[Callable[[], object]], repeats: int = 15) -> tuple[float, float]:
    """Seconds of one call. calls: the same work over different memory, see `copies_needed`.

    Returns the median over replays of the graph, and the spread: (largest - smallest) / median.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # for what the calls read
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    warm_until = time.perf_counter() + WARM_SECONDS
    while time.perf_counter() < warm_until:
        graph.replay()
        torch.cuda.synchronize()
    for begin, end in events:
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    times = [begin.elapsed_time(end) * 1e-3 / len(calls) for begin, end in events]
    median = statistics.median(times)
    del graph
    return median, (max(times) - min(times)) / median


@triton.jit
def _read_kernel(x_ptr, o_ptr, per_program, BLOCK: tl.constexpr):  # noqa: ANN001, ANN202
    first = tl.program_id(0).to(tl.int64) * per_program
    total = tl.zeros([BLOCK], dtype=tl.int32)
    for start in tl.range(0, per_program, BLOCK, num_stages=4):
        total ^= tl.load(x_ptr + first + start + tl.arange(0, BLOCK))  # per_program is a multiple of BLOCK
    tl.store(o_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), total)


def read_limit() -> float:
    """Bytes per second that a kernel which only reads reaches on 4 GB: the ceiling of attention over a cache."""
    block, best = 4096, 0.0
    for programs in (2, 4, 8):
        programs *= torch.cuda.get_device_properties(0).multi_processor_count
        per_program = 2**30 // programs // block * block
        x = torch.randint(-(2**31), 2**31 - 1, (per_program * programs,), dtype=torch.int32, device="cuda")
        out = torch.empty(programs * block, dtype=torch.int32, device="cuda")
        seconds, _ = cold_time([lambda x=x, o=out, n=per_program: _read_kernel[(len(o) // block,)](x, o, n, block)])
        best = max(best, x.nbytes / seconds)
        del x
    return best


def copy_limit() -> float:
    """Bytes read plus bytes written per second of a 2 GB device-to-device copy by an elementwise kernel."""
    x = torch.randint(-(2**31), 2**31 - 1, (2**29,), dtype=torch.int32, device="cuda")
    out = torch.empty_like(x)
    seconds, _ = cold_time([lambda: torch.bitwise_not(x, out=out)])  # a copy in a graph is slower than this
    return 2 * x.nbytes / seconds


def beside_a_copy(calls: Sequence[Callable[[], object]], nbytes: int, limit: float) -> dict[str, object]:
    """Time and rate of one call. nbytes: read and written by it;  limit: bytes per second of a copy"""
    seconds, spread = cold_time(calls)
    return {
        "us": round(seconds * 1e6, 2),
        "spread": round(spread, 3),
        "gb_per_s": round(nbytes / seconds * 1e-9, 1),
        "of_copy_limit": round(nbytes / seconds / limit, 3),
        "copy_limit_gb_per_s": round(limit * 1e-9, 1),
        **machine(),
    }


def machine() -> dict[str, str]:
    """Device and versions, the last columns of every CSV."""
    return {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
