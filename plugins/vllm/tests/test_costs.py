"""The figures of docs/explanation/vllm-costs.md are those of the CSV that it names."""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "explanation" / "vllm-costs.md").read_text(encoding="utf-8")
BATCH = ("batch requests", "fits concurrency", "batch tokens_a_second", "batch ms_a_token")
WHOLE = (BATCH[0], *BATCH[2:])
BATCHES = (BATCH[0], BATCH[2], BATCH[2], BATCH[3], BATCH[3])  # two of them
THRICE = (*BATCH[:2], *[BATCH[2]] * 3, *[BATCH[3]] * 3)
SINGLE = ("single seconds_to_first_token", "single ms_a_token")
TWICE = (SINGLE[0], SINGLE[0], SINGLE[1])
TRACE = (
    "fits kv_bytes", "fits concurrency", "trace tokens_a_second", "trace seconds_to_first_token",
    "trace seconds_to_first_token_p99", "trace ms_a_token", "trace ms_a_token_p99",
)  # fmt: skip


def rows() -> dict[tuple[str, str], list[dict[str, str]]]:
    """By job and run, in the order in which they ran."""
    found = defaultdict(list)
    with (ROOT / "plugins" / "vllm" / "benchmarks" / "results" / "serve_h200.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            found[row["job"], row["run"]].append(row)
    return found


ROWS = rows()


def figures(job: str, names: tuple[str, ...], first: int = 0) -> list[float]:
    """names: of a run and a column, in its row `first`; one that comes twice is of that row, then of the next"""
    found = []
    for index, name in enumerate(names):
        run, column = name.split()
        value = float(ROWS[job, run][first + names[:index].count(name)][column])
        found.append(value / 1e9 if column == "kv_bytes" else value)
    return found


@pytest.mark.parametrize(
    ("label", "job", "names", "first"),
    [
        ("| dense, three machines |", "dense", THRICE, 0),
        ("| dense, fp8 cache |", "fp8", BATCH, 0),
        ("| slab, 20 % kept, two machines |", "slab-20", BATCHES, 0),
        ("| growing blocks, 20 % kept |", "blocks-20", BATCH, 0),
        ("| `keydiff`, 20 % kept, cut every 512 tokens |", "keydiff-20", WHOLE, 0),
        ("| `snapkv`, likewise, two machines |", "snapkv-20", BATCHES, 0),
        ("| 32k, dense, machine 1 |", "dense", SINGLE, 0),
        ("| 32k, dense, machine 5;", "dense", TWICE, 1),
        ("| 32k, dense, machine 6;", "dense", TWICE, 3),
        ("| 32k, slab, 30 % kept;", "slab-30", TWICE, 0),
        ("| 32k, growing blocks, 30 % kept;", "blocks-30", SINGLE, 0),
        ("| 32k, `keydiff`, 20 % kept;", "keydiff-20", TWICE, 0),
        ("| 32k, `snapkv`, 20 % kept, machine 5;", "snapkv-20", TWICE, 0),
        ("| 32k, `snapkv`, 20 % kept, machine 6;", "snapkv-20", TWICE, 2),
        ("| 128k, dense, machine 2;", "dense-128k", SINGLE, 0),
        ("| 128k, dense, machine 6;", "dense-128k", SINGLE, 2),
        ("| 128k, slab, 30 % kept;", "slab-30-128k", SINGLE, 0),
        ("| 128k, growing blocks, 30 % kept;", "blocks-30-128k", SINGLE, 0),
        ("| 118 GB, 27.41 | dense |", "dense-trace", TRACE, 0),
        ("| 118 GB, 136 | slab", "slab-20-trace", TRACE, 0),
        ("| 43 GB, 9.94 | dense |", "dense-trace-small", TRACE, 0),
        ("| 42 GB, 48 | slab", "slab-20-trace-small", TRACE, 0),
    ],
)
def test_tables_say_what_was_measured(label: str, job: str, names: tuple[str, ...], first: int) -> None:
    (line,) = [line for line in PAGE.splitlines() if line.startswith(label)]
    cells = line.split(" | ") if names is TRACE else line.split(" | ")[1:]
    shown = [text for cell in cells for text in re.findall(r"\d+(?:\.\d+)?", re.sub(r"\d+ % kept", "", cell))]
    expected = figures(job, names, first)
    assert len(shown) == len(expected)
    for text, value in zip(shown, expected, strict=True):
        assert abs(float(text) - value) <= 0.501 * 10 ** -len(text.partition(".")[2])  # half a unit of its last digit


@pytest.mark.parametrize(
    ("label", "name", "pairs"),
    [
        (
            "| requests at 20 %", "fits concurrency",
            {
                ("slab-20", 0, "dense", 0): "4.96", ("blocks-20", 0, "dense", 1): "blocks 5.00",
                ("keydiff-20", 0, "dense", 2): "`keydiff` 4.93", ("snapkv-20", 1, "dense", 2): "`snapkv` 4.85",
            },
        ),
        (
            "| tokens a second at 20 %, over dense |", "batch tokens_a_second",
            {
                ("slab-20", 0, "dense", 0): "5.01", ("blocks-20", 0, "dense", 1): "blocks 5.04",
                ("keydiff-20", 0, "dense", 2): "`keydiff` 4.67", ("snapkv-20", 1, "dense", 2): "`snapkv` 4.64",
            },
        ),
        (
            "| tokens a second at 20 %, over dense with", "batch tokens_a_second",
            {
                ("slab-20", 0, "fp8", 0): "4.00", ("blocks-20", 0, "fp8", 0): "blocks 3.84",
                ("keydiff-20", 0, "fp8", 0): "`keydiff` 3.54", ("snapkv-20", 1, "fp8", 0): "`snapkv` 3.53",
            },
        ),
        (
            "| ms a token at 30 %", "single ms_a_token",
            {("slab-30", 0, "dense", 0): "0.88", ("blocks-30", 0, "dense", 0): "blocks 0.89"},
        ),
        (
            "| the same at 128k | 0.75 |", "single ms_a_token",
            {("slab-30-128k", 0, "dense-128k", 0): "0.68", ("blocks-30-128k", 0, "dense-128k", 2): "blocks 0.68"},
        ),
        (
            "| first token, over dense: 32k", "single seconds_to_first_token",
            {
                ("slab-30", 0, "dense", 0): "0.98", ("blocks-30", 0, "dense", 0): "blocks 0.88",
                ("keydiff-20", 0, "dense", 3): "`keydiff` 1.54", ("keydiff-20", 1, "dense", 4): "1.54 and 1.50",
                ("snapkv-20", 2, "dense", 3): "`snapkv` 1.90", ("snapkv-20", 3, "dense", 4): "1.90 and 1.74",
            },
        ),
        (
            "| the same at 128k | 1.1 |", "single seconds_to_first_token",
            {("slab-30-128k", 0, "dense-128k", 0): "0.89", ("blocks-30-128k", 0, "dense-128k", 2): "blocks 0.70"},
        ),
    ],
)  # fmt: skip
def test_ratios_follow_from_them(label: str, name: str, pairs: dict[tuple[str, int, str, int], str]) -> None:
    """pairs: a job and its row, over another's: of the same machine, or the first where that has none"""
    (line,) = [line for line in PAGE.splitlines() if line.startswith(label)]
    for (job, row, other, below), text in pairs.items():
        assert text in line
        ratio = figures(job, (name,), row)[0] / figures(other, (name,), below)[0]
        assert f"{ratio:.2f}" == text.split()[-1]
