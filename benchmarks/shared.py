"""What the benchmarks of whole models share: names of devices and versions, ragged tables, and progress as lines."""

from __future__ import annotations

import importlib
import platform
import sys
from pathlib import Path

import torch
from torch import Tensor

from kvpolicy import Budget, ModelSpec, apportion
from kvpolicy.progress import Progress

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels" / "benchmarks"))
from basics import command_line as command_line
from basics import read_csv as read_csv
from basics import timed as timed
from basics import write_csv as write_csv


def device_name(device: str) -> str:
    """The GPU's own name, or the processor's and the threads in use."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def versions(*packages: str) -> dict[str, str]:
    return {name: importlib.import_module(name).__version__ for name in packages}


def machine(device: str, *packages: str) -> dict[str, str]:
    """Device and versions, the last columns of a CSV."""
    return {"device": device_name(device), **versions(*packages)}


def table_of(spec: ModelSpec, kept: float, context: int, *, ragged: bool = True) -> Tensor:
    """Capacities `[L, H]` that keep a part of the context: by shares lognormal with sigma 1, or the same for all."""
    shares = torch.ones(spec.table_shape)
    if ragged:
        shares = torch.randn(spec.table_shape, generator=torch.Generator().manual_seed(0)).exp()
    return apportion(shares, Budget(spec.total_entries(kept, context), spec.table_shape, 5, context))


class Notes(Progress):
    """The notes of long work, as lines."""

    def note(self, message: str) -> None:
        print(message, flush=True)
