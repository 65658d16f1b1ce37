"""What a device is called where figures are shown, and what it holds."""

from __future__ import annotations

import os

import torch


def device_name(device: torch.device | str) -> str:
    """The GPU's own name, and `cpu`."""
    where = torch.device(device)
    return torch.cuda.get_device_name(where) if where.type == "cuda" else where.type


def memory_bytes(device: torch.device | str) -> int | None:
    """All of the GPU's memory, or of this machine's for any other device; None where the system does not say."""
    where = torch.device(device)
    if where.type == "cuda":
        return int(torch.cuda.get_device_properties(where).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None
