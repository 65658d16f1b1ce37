"""Benchmarks around the table of tasks: what they would search, and what a figure of them shows."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """Imports one by its name."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == FOLDER:
            del sys.modules[name]


def row(method, kept, score, task="longbench/trec_e"):
    return {"task": task, "method": method, "retention": kept, "n": 2, "score": score, "low": 0.0, "high": 1.0}


def test_every_task_is_a_part_and_every_method_a_line(benchmark):
    rows = [row("baklava.json", 0.1, 0.25), row("baklava.json", 0.5, 0.75), row("full", 1.0, 0.9)]
    picture = benchmark("longbench").figure(
        [*rows, row("full", 1.0, 0.4, task="all"), row("full", 1.0, 0.3, task="b")], "about"
    )
    first, second = picture.axes
    assert first.get_title() == "trec_e, n = 2" and second.get_title() == "b, n = 2"
    baklava = next(line for line in first.lines if line.get_label().startswith("BaKlaVa"))
    assert baklava.get_xdata().tolist() == [0.5, 0.9] and baklava.get_ydata().tolist() == [75, 25]
    assert next(line for line in first.lines if line.get_label() == "full cache").get_ydata()[0] == 90


def test_searches_that_are_done_are_not_begun_again(benchmark, tmp_path):
    options = {"model": "smollm2-135m", "text": Path("x"), "device": "cpu", "dtype": "float32", "search_context": 64}
    options |= {"retentions": [0.5, 0.1], "trials": 2, "steps": 3, "out": tmp_path}
    (tmp_path / "squeeze.json").write_text("{}")
    commands = benchmark("longbench").tunes(SimpleNamespace(**options))
    assert list(commands) == ["baklava", "learned_0.5", "learned_0.1"]
    assert commands["learned_0.1"][-4:] == ["--retention", 0.1, "--out", "learned_0.1.json"]


def test_budgets_are_learned_on_each_source_apart(benchmark, tmp_path):
    options = {"model": "smollm2-135m", "text": Path("x"), "device": "cpu", "dtype": "float32", "policy": "snapkv"}
    options |= {"retentions": [0.25], "steps": 3, "sequences": 4, "context": 64, "learned_task": "vt", "out": tmp_path}
    commands = benchmark("transfer").tunes(SimpleNamespace(**options))
    objectives = {name: command[command.index("--objective") + 1] for name, command in commands.items()}
    learned = {"novels_0.25": "perplexity", "needles_0.25": "retrieval", "answers_0.25": "task:ruler/vt"}
    assert objectives == learned
