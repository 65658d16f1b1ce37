"""docs/examples/scheduler.py: everyone is served, and with everything kept the answers are those of transformers."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "docs" / "examples" / "scheduler.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("scheduler", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["scheduler"] = module  # its dataclass looks there
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules["scheduler"]


def test_with_everything_kept_both_give_the_same_answers(example):
    model, memory = example.load("tiny"), 1e6
    slots, batches = (example.trace(model, requests=7, rate=50.0, scale=64) for _ in range(2))
    assert min(map(len, slots)) < 64 < max(map(len, slots))
    example.in_slots(model, slots, memory, 1.0)
    example.in_batches(model, batches, memory)
    assert [len(request.answer) for request in slots] == [request.count for request in slots]
    assert [request.answer for request in slots] == [request.answer for request in batches]
    assert all(request.ended > request.arrival for request in (*slots, *batches))


def test_it_prints_both_ways(example, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scheduler.py", "--requests", "5", "--scale", "128"])
    example.main()
    slots, batches = capsys.readouterr().out.splitlines()
    figures = r"0.3 MB: 5 answers, (\d+) tokens in [\d.]+ s, \d+ tokens/s, an answer after [\d.]+ s"
    assert (
        re.fullmatch(f"slots, 20% kept, {figures}", slots)[1] == re.fullmatch(f"static batches, {figures}", batches)[1]
    )


def test_it_is_short():
    assert len(EXAMPLE.read_text().splitlines()) <= 150
