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
BATCHES = (*BATCH[:2], BATCH[2], BATCH[2], BATCH[3], BATCH[3])  # two of them
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
        ("| dense, two machines |", "dense", BATCHES, 0),
        ("| dense, fp8 cache |", "fp8", BATCH, 0),
        ("| slab, 20 % kept, two machines |", "slab-20", (BATCHES[0], *BATCHES[2:]), 0),
        ("| growing blocks, 20 % kept |", "blocks-20", BATCH, 0),
        ("| `keydiff`, 20 % kept, cut every 512 tokens |", "keydiff-20", WHOLE, 0),
        ("| `snapkv`, likewise, cuts recorded |", "snapkv-20", WHOLE, 0),
        ("| 32k, dense, the first machine |", "dense", SINGLE, 0),
        ("| 32k, dense, the last; two runs |", "dense", TWICE, 1),
        ("| 32k, slab, 30 % kept;", "slab-30", TWICE, 0),
        ("| 32k, growing blocks, 30 % kept;", "blocks-30", SINGLE, 0),
        ("| 32k, `keydiff`, 20 % kept;", "keydiff-20", TWICE, 0),
        ("| 32k, `snapkv`, 20 % kept, cuts recorded;", "snapkv-20", TWICE, 0),
        ("| 128k, dense;", "dense-128k", SINGLE, 0),
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
        ("| requests at 20 %", "fits concurrency", {("slab-20", "dense", 0): "4.96"}),
        (
            "| tokens a second at 20 %, over dense |", "batch tokens_a_second",
            {
                ("slab-20", "dense", 0): "5.01", ("blocks-20", "dense", 1): "blocks 5.04",
                ("keydiff-20", "dense", 0): "`keydiff` 4.10", ("snapkv-20", "dense", 1): "`snapkv` 4.62",
            },
        ),
        (
            "| tokens a second at 20 %, over dense with", "batch tokens_a_second",
            {("slab-20", "fp8", 0): "4.00", ("blocks-20", "fp8", 0): "3.84"},
        ),
        (
            "| ms a token at 30 %", "single ms_a_token",
            {("slab-30", "dense", 0): "0.88", ("blocks-30", "dense", 0): "blocks 0.89"},
        ),
        (
            "| the same at 128k | 0.75 |", "single ms_a_token",
            {("slab-30-128k", "dense-128k", 0): "0.68", ("blocks-30-128k", "dense-128k", 0): "blocks 0.70"},
        ),
        (
            "| first token, over dense: 32k", "single seconds_to_first_token",
            {
                ("slab-30", "dense", 0): "0.98", ("blocks-30", "dense", 0): "blocks 0.88",
                ("keydiff-20", "dense", 0): "`keydiff` 2.41", ("snapkv-20", "dense", 1): "`snapkv` 1.95",
            },
        ),
        (
            "| the same at 128k | 1.1 |", "single seconds_to_first_token",
            {("slab-30-128k", "dense-128k", 0): "0.89", ("blocks-30-128k", "dense-128k", 0): "blocks 0.69"},
        ),
    ],
)  # fmt: skip
def test_ratios_follow_from_them(label: str, name: str, pairs: dict[tuple[str, str, int], str]) -> None:
    """Over a row of the other job: the first, or that of the same machine."""
    (line,) = [line for line in PAGE.splitlines() if line.startswith(label)]
    for (job, other, row), text in pairs.items():
        assert text in line
        ratio = figures(job, (name,))[0] / figures(other, (name,), row)[0]
        assert f"{ratio:.2f}" == text.split()[-1]
