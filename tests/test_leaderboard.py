"""The page of scores says what the committed results say, and its tables are right in a case that is worked by hand."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture
def leaderboard(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("make_leaderboard", DOCS / "make_leaderboard.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "make_leaderboard", module)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("task_lines", None)


def line(method, kept, scores, task="vt", uniform="snapkv/uniform", **more):
    own = {"model": "M", "dtype": "float32", "context": 64, "limit": 2, "seed": 0, "question": "agnostic", "first": 0}
    own |= {"task": task, "method": method, "retention": kept, "scores": scores, "uniform": uniform, "device": "a CPU"}
    return own | {"bytes": 25, "dense_bytes": 100} | more


LINES = [
    line("full", 1.0, [1, 1], uniform="", bytes=101),
    line("snapkv/uniform", 0.25, [0, 0, 1, 0]),
    line("snapkv/uniform", 0.25, [1, 1, 1, 1], task="cwe"),
    line("snapkv/adakv", 0.25, [1, 1, 1, 1]),
    line("snapkv/adakv", 0.25, [1, 1, 1, 1], task="cwe"),
    line("h2o/uniform", 0.25, [1, 1, 1, 1], uniform="h2o/uniform"),
]


def test_the_page_is_what_the_results_say(leaderboard):
    assert leaderboard.PAGE.read_text(encoding="utf-8") == leaderboard.render(), "run python docs/make_leaderboard.py"


def test_a_table_by_hand(leaderboard):
    head, _, full, best, uniform, partial = leaderboard.table(leaderboard.table_rows(LINES)).splitlines()
    assert head == "| kept | method | mean | against uniform | vt | cwe | bytes |"
    assert full == "| 100 % | `full` |  |  | 100 (100 to 100) |  | 101.0 % |"
    assert best.startswith("| 25 % | `snapkv/adakv` | 100 (100 to 100) | **+37.5 (")
    assert best.endswith("** | 100 (100 to 100) | 100 (100 to 100) | 25.0 % |")
    assert uniform.startswith("| 25 % | `snapkv/uniform` | 62 (")
    assert uniform.endswith(" |  | 25 (0 to 75) | 100 (100 to 100) | 25.0 % |")
    assert partial == "| 25 % | `h2o/uniform` |  |  | 100 (100 to 100) |  | 25.0 % |", "no mean of some tasks"


def test_the_family_that_all_tasks_share_is_not_said_in_each_column(leaderboard):
    def head(*tasks):
        lines = [line("full", 1.0, [1, 1], task=task, uniform="") for task in tasks]
        return leaderboard.table(leaderboard.table_rows(lines)).splitlines()[0]

    assert "| vt | cwe |" in head("ruler/vt", "ruler/cwe")
    assert "| ruler/vt | scbench/kv |" in head("ruler/vt", "scbench/kv")


def test_runs_stand_apart_by_question_and_say_how_few_they_are(leaderboard, tmp_path, monkeypatch):
    aware = line("full", 1.0, [1, 1], uniform="", question="aware")
    failed = line("tova/uniform", 0.25, [], error="RuntimeError: no")
    del failed["scores"]
    lines = [*LINES, aware, failed]
    (tmp_path / "ruler_x.jsonl").write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.setattr(leaderboard, "RESULTS", tmp_path)
    monkeypatch.setattr(leaderboard, "COMPARISONS", ())
    before, after = leaderboard.render().split("## Question-aware")
    assert before.count("`full`") == 1 == after.count("`full`") and "snapkv/adakv" not in after
    assert "n = 2 to 4 for each task" in before and "n = 2 for each task" in after
    assert "Too few samples" in before and "tova" not in before
