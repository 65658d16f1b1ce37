"""What every benchmark has, whatever it measures: options, a clock, and a CSV."""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

Result = TypeVar("Result")


def command_line(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help begins with the docstring of the script, as it stands there."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def timed(call: Callable[[], Result]) -> tuple[float, Result]:
    """Seconds until all that a call launched on a GPU is done, and what it returned."""
    _wait()
    begin = time.perf_counter()
    result = call()
    _wait()
    return time.perf_counter() - begin, result


def _wait() -> None:
    if torch.cuda.is_initialized():  # else nothing runs there
        torch.cuda.synchronize()


def write_csv(path: str | Path, rows: Sequence[dict[str, object]]) -> None:
    """One line a row, in the columns of all rows together."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: str | Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))
