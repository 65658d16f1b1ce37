"""The most memory that something took."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

_OF_PROCESS = Path("/proc/self")  # Linux alone has it


class PeakMemory:
    """The most memory since this was made: on a GPU what torch's allocator gave out there, elsewhere of the process.

    fresh: whether the high-water mark is set back first, for who has the process to themselves. Otherwise nothing is
        known where more was in use at some time before

    Only the system's word is asked for, not the device's.
    """

    def __init__(self, device: torch.device, *, fresh: bool = False) -> None:
        self._device = device
        if fresh:
            _forget(device)
        self._before, self._most = _in_use(device)

    def measure(self) -> int | None:
        """Bytes above what was in use at the beginning; None where the system does not say."""
        most = _in_use(self._device)[1]
        if self._before is None or most is None or self._most is None:
            return None
        return most - self._before if most > self._most or self._most == self._before else None


def _in_use(device: torch.device) -> tuple[int | None, int | None]:
    """Bytes now, and the most so far."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    try:
        lines = (_OF_PROCESS / "status").read_text().splitlines()
    except OSError:
        return None, None
    sizes = {name: rest.split() for name, _, rest in (line.partition(":") for line in lines)}
    now, most = (1024 * int(sizes[name][0]) if name in sizes else None for name in ("VmRSS", "VmHWM"))
    return now, most


def _forget(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        (_OF_PROCESS / "clear_refs").write_text("5")
