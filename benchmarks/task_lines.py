"""Lines of JSON with the scores of a batch of samples under a method, and what they come to."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, BinaryIO

import torch

from kvpolicy.measure.stats import mean_interval, paired_difference

_KEY = ("model", "dtype", "context", "limit", "seed", "question", "task", "method", "retention", "first")


def identity(line: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(line[name] for name in _KEY)


def read_lines(path: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The lines of a file by what they are of; the last one of a run that was killed may be broken."""
    lines: dict[tuple[Any, ...], dict[str, Any]] = {}
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        lines[identity(line)] = line
    return lines


def add_line(path: Path, line: dict[str, Any]) -> None:
    """Appends a line, behind the end of one that a killed run has left broken."""
    with path.open("a+b") as file:
        broken = file.tell() > 0 and not _ends_line(file)
        file.write(f"{chr(10) * broken}{json.dumps(line)}\n".encode())


def _ends_line(file: BinaryIO) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def table_rows(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One for each question, task, method and retention, and one of all tasks together.

    n:     samples of the method
    pairs: those of them that uniform budgets were measured on too, which the difference is of
    """
    scores: dict[tuple[str, str, str, float], dict[tuple[str, int, int], float]] = {}
    parts: dict[tuple[str, str, str, float], list[float]] = {}
    uniform = {line["method"]: line["uniform"] for line in lines}
    for line in lines:
        for task in (line["task"], "all"):
            key = (line["question"], task, line["method"], line["retention"])
            places = [(line["task"], line["seed"], line["first"] + index) for index in range(len(line["scores"]))]
            scores.setdefault(key, {}).update(zip(places, line["scores"], strict=True))
            parts.setdefault(key, []).append(line["bytes"] / line["dense_bytes"])
    rows = []
    for (question, task, method, kept), own in scores.items():
        values = torch.tensor([own[place] for place in sorted(own)], dtype=torch.float64)
        low, high = mean_interval(values)
        bytes_part = sum(parts[question, task, method, kept]) / len(parts[question, task, method, kept])
        row = {"question": question, "task": task, "method": method, "retention": kept, "n": len(own)}
        row |= {"score": float(values.mean()), "low": low, "high": high, "bytes_of_full": bytes_part}
        other = scores.get((question, task, uniform[method], kept), {})
        shared = sorted(own.keys() & other.keys())
        if method != uniform[method] and len(shared) > 1:
            both = [torch.tensor([side[place] for place in shared], dtype=torch.float64) for side in (own, other)]
            difference = paired_difference(*both)
            row |= {"minus_uniform": difference.mean, "minus_low": difference.low, "minus_high": difference.high}
            row["pairs"] = len(shared)
        rows.append(row)
    return rows
