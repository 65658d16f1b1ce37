"""Recording work on a GPU."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

_FAILED: list[Any] = []
"""Graphs that live on: where ending a recording fails, torch's allocators go on asking its graph, by its address,
whether a stream records for it, and another graph could get that address."""


class Recording(Protocol):
    """Work that can be done again."""

    def replay(self) -> None: ...


def unrecordable(device: torch.device) -> str | None:
    """Why nothing can be recorded there, or None."""
    return None if device.type == "cuda" else f"the model is on {device}, CUDA graphs need a CUDA device"


def record(work: Callable[[], Any], device: torch.device) -> tuple[Recording, Any]:
    """A CUDA graph of `work`, and what it returned; the device has done nothing of it yet.

    device: where all of it happens, be it the current one or not

    Its kernels must have run before. Raises whatever it raises, and `RuntimeError` for what a graph cannot hold.
    """
    # `torch.cuda.graph` would collect garbage and give memory back first, which takes longer than the recording
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # of torch
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream), _no_garbage_collected():  # the stream's device is the current one, too
        graph.capture_begin(capture_error_mode="thread_local")  # other threads may go on
        try:
            out = work()
        except BaseException:
            _give_up(graph)
            raise
        graph.capture_end()
    torch.cuda.current_stream(device).wait_stream(stream)
    return graph, out


@contextlib.contextmanager
def _no_garbage_collected() -> Iterator[None]:
    """What is collected may be another graph, and to give that up is an error while this one is recorded."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _give_up(graph: torch.cuda.CUDAGraph) -> None:
    """Ends a recording that failed; torch complains again, about what has been raised already."""
    try:
        graph.capture_end()
    except RuntimeError:
        _FAILED.append(graph)
    # Where it complains it leaves the random numbers of the device waiting for a recording that has ended. The same
    # numbers, not waiting:
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    generator.graphsafe_set_state(generator.clone_state())
