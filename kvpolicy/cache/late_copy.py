"""What a device says, without waiting for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class LateCopy:
    """A copy of a tensor on the host, which arrives when the device has come so far."""

    def __init__(self, tensor: Tensor) -> None:
        self._arrival: Any = None
        if not waits(tensor):
            self.value = tensor.clone()
            return
        self.value = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
        self._arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]  # of torch
        self._arrival.record(torch.cuda.current_stream(tensor.device))

    @property
    def has_arrived(self) -> bool:
        return self._arrival is None or bool(self._arrival.query())


def waits(tensor: Tensor) -> bool:
    """Whether who reads it waits for a device."""
    return tensor.is_cuda
