"""How long the first token behind a prompt took to come, and how much memory."""

from __future__ import annotations

import copy
import time
from typing import Any

import torch

from kvpolicy.cache.peak_memory import PeakMemory


class FirstToken:
    """From the first keys of a prompt until the first token behind it is handed in, or asked of on a GPU.

    peak_nbytes: the most memory meanwhile above what was in use before, activations included; None where the system
        does not say. See `PeakMemory`
    """

    def __init__(self) -> None:
        self.peak_nbytes: int | None = None
        self._peak: PeakMemory | None = None
        self._moments: list[Any] = []

    @property
    def seconds(self) -> float | None:
        """None before it has come. Waits for the device to have reached it."""
        if len(self._moments) < 2:
            return None
        begun, ended = self._moments
        if isinstance(begun, float):
            return float(ended - begun)
        ended.synchronize()
        return float(begun.elapsed_time(ended)) / 1e3

    def begin(self, device: torch.device) -> None:
        """Tokens of a prompt come; the first time counts."""
        if not self._moments:
            self._peak, self._moments = PeakMemory(device), [_moment(device)]
            self._device = device

    def come(self) -> None:
        """The first token behind it is there, unless it was before."""
        if self._peak is not None:
            self.peak_nbytes, self._peak = self._peak.measure(), None
            self._moments = [*self._moments, _moment(self._device)]

    def __deepcopy__(self, memo: dict[int, Any]) -> FirstToken:
        return copy.copy(self)  # moments of a device are not written into


def _moment(device: torch.device) -> Any:
    """Now, as the device sees it; it is not waited for."""
    if device.type != "cuda":
        return time.perf_counter()
    moment = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # of torch
    moment.record(torch.cuda.current_stream(device))
    return moment
