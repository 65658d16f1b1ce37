"""Work that comes again and again on a GPU: as a CUDA graph it is one launch for the host instead of many dozens."""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable
from typing import Any

import torch


class RecordedWork:
    """By a key. At first it is done as it is, which compiles its kernels; the second time it is recorded.

    Nothing that it makes outlives it, so that all recordings share the memory for what they make: a pool and a stream,
    as torch keeps a pool's memory for the stream that had it. The pool goes with the last of them, and cannot be asked
    for again: a recording is never given up before the others.
    """

    def __init__(self) -> None:
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}
        self._memory: tuple[Any, torch.cuda.Stream] | None = None

    def do(self, key: Hashable, work: Callable[[], None], device: torch.device) -> None:
        """Waits for nothing. work: the same for a key, on the same memory; numbers that change lie on the device."""
        if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            work()
        elif key not in self._graphs:
            self._graphs[key] = None
            work()
        else:
            graph = self._graphs[key] or self._record(work, device)
            self._graphs[key] = graph
            graph.replay()

    def _record(self, work: Callable[[], None], device: torch.device) -> torch.cuda.CUDAGraph:
        if self._memory is None:
            self._memory = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # of torch
        graph, (pool, stream) = torch.cuda.CUDAGraph(), self._memory
        stream.wait_stream(torch.cuda.current_stream(device))
        is_collecting = gc.isenabled()
        gc.disable()  # another graph may be among the garbage, which must not be given up meanwhile
        try:
            with torch.cuda.stream(stream):
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")  # other threads may go on
                try:
                    work()
                finally:
                    graph.capture_end()
        except BaseException:
            self._memory = None  # the pool may have gone with this recording, if it was the only one
            raise
        finally:
            if is_collecting:
                gc.enable()
        torch.cuda.current_stream(device).wait_stream(stream)
        return graph
