"""What the arguments of verbs must be, checked before any work. Messages name arguments; a shell says its options."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import torch

from kvpolicy.errors import BudgetError, KVPolicyError, ModelError, TextError, foreign

LEAST_CONTEXT = 16
_DTYPES = ("auto", "float32", "bfloat16", "float16")


def several(value: Any) -> list[Any]:
    """An argument that may be one value, several or none."""
    if value is None:
        return []
    return [value] if isinstance(value, str | Path | float | int) else list(value)


def optional_path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)


def pick_device(name: str) -> str:
    """The name itself; "auto" is a CUDA device if there is one. Raises `ModelError` if it does not exist."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"no device is called '{name}'; try cpu, cuda or cuda:0") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"the device '{name}' was asked for, but PyTorch finds no CUDA device here; use device=cpu")
    with foreign(f"the device '{name}' cannot be used", ModelError):
        torch.zeros(1, device=device).item()  # meta holds no numbers, and not every GPU that is named is there
    return name


def pick_dtype(name: str, device: str) -> str:
    """The name itself; "auto" is bfloat16 on a GPU and float32 on the CPU. Raises `ModelError` for any other."""
    if name not in _DTYPES:
        raise ModelError(f"dtype= must be auto, float32, bfloat16 or float16, got '{name}'")
    if name != "auto":
        return name
    return "float32" if device == "cpu" else "bfloat16"


def check_retention(retention: float) -> float:
    if not 0 < retention <= 1:
        raise BudgetError(f"retention= is the fraction that is kept, in (0, 1]; got {retention:g}")
    return retention


def check_context(length: int) -> int:
    if length < LEAST_CONTEXT:
        raise BudgetError(f"context= must be at least {LEAST_CONTEXT} tokens, got {length}")
    return length


def check_least(least: int, **counts: int | None) -> None:
    """Raises `BudgetError` for a count below `least`; None is no count."""
    for name, count in counts.items():
        if count is not None and count < least:
            raise BudgetError(f"{name}= must be at least {least}, got {count}")


def check_text(path: Path | None) -> None:
    """Fails before a model is loaded. Raises `TextError` for a file that is not there or cannot be read."""
    if path is None:
        return
    code = errno.ENOENT if not path.exists() else errno.EISDIR if path.is_dir() else errno.EACCES
    if code != errno.EACCES or not os.access(path, os.R_OK):
        raise TextError(f"cannot read the text {path}: {os.strerror(code)}")


def check_writable(path: Path | None) -> None:
    """Fails before the work, not after it. Raises `KVPolicyError`."""
    if path is None:
        return
    folder = path.resolve().parent
    if path.is_dir():
        raise KVPolicyError(f"cannot write {path}: it is a directory")
    if not folder.is_dir():
        raise KVPolicyError(f"cannot write {path}: there is no directory {folder}")
    if path.exists() and not path.is_file():
        raise KVPolicyError(f"cannot write {path}: it is no regular file")  # a device would be replaced by a file
    probe = folder / f".{path.name}.probe"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise KVPolicyError(f"cannot write {path}: {error.strerror}") from error
