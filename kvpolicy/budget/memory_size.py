"""Bytes as people write them."""

from __future__ import annotations

import re

from kvpolicy.errors import BudgetError

_UNITS = {unit: 10 ** (3 * power) for power, unit in enumerate(("B", "kB", "MB", "GB", "TB"))}
_UNITS |= {unit: 2 ** (10 * power) for power, unit in enumerate(("B", "KiB", "MiB", "GiB", "TiB"))}
_SIZES = {unit.lower(): count for unit, count in _UNITS.items()}


def read_size(text: str | int) -> int:
    """Bytes of a size as people write it: `24GB`, `79.6 GiB`, or a number of bytes. Raises `BudgetError`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(text).strip().lower())
    count = match and float(match[1]) * _SIZES.get(match[2] or "b", 0)
    if not count:
        raise BudgetError(f"'{text}' is no size: expected a number above 0 with one of {', '.join(_UNITS)}, as in 24GB")
    return int(count)


def read_memory(memory: float | int | str) -> float | int:
    """A part of the full cache's bytes, in (0, 1], as a float, or bytes as an int: of 0.15, `0.15`, `8GiB` or a number.

    Raises `BudgetError`.
    """
    try:
        value = float(memory)
    except (TypeError, ValueError):
        return read_size(str(memory))
    if isinstance(memory, bool) or not value > 0:
        raise BudgetError(f"memory is {memory!r}, expected a part of the full cache's bytes above 0, or bytes as 8GiB")
    return value if value <= 1 else read_size(str(memory))
