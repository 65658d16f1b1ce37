"""What a device is called where figures are shown, and what it holds."""

from __future__ import annotations

import os
import re

import torch

from kvpolicy.errors import BudgetError

_UNITS = {unit: 10 ** (3 * power) for power, unit in enumerate(("B", "kB", "MB", "GB", "TB"))}
_UNITS |= {unit: 2 ** (10 * power) for power, unit in enumerate(("B", "KiB", "MiB", "GiB", "TiB"))}
_SIZES = {unit.lower(): count for unit, count in _UNITS.items()}


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


def read_size(text: str | int) -> int:
    """Bytes of a size as people write it: `24GB`, `79.6 GiB`, or a number of bytes. Raises `BudgetError`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(text).strip().lower())
    count = match and float(match[1]) * _SIZES.get(match[2] or "b", 0)
    if not count:
        raise BudgetError(f"'{text}' is no size: expected a number above 0 with one of {', '.join(_UNITS)}, as in 24GB")
    return int(count)
