"""The table of tasks that is measured on a GPU, at tiny size: without optuna, ended by its clock, gone on with."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "task_table.py"
ALONE = "import runpy, sys; sys.modules['optuna'] = None; sys.argv = sys.argv[1:]; sys.path.insert(0, {!r}); "
ALONE = ALONE.format(str(SCRIPT.parent)) + "runpy.run_path(sys.argv[0], run_name='__main__')"


@pytest.fixture(scope="module")
def lines(tiny_checkpoint, tmp_path_factory):
    """What a run in a process of its own wrote, and the command."""
    out = tmp_path_factory.mktemp("table") / "rows.jsonl"
    command = ["--model", tiny_checkpoint, "--tasks", "passkey", "key-value", "--context", 400, "--limit", 3]
    command += ["--batch-size", 2, "--methods", "snapkv/uniform", "snapkv/adakv", "--retentions", 0.5, "--out", out]
    command += ["--others", "keydiff", "--questions", "agnostic"]
    started = [sys.executable, "-c", ALONE, SCRIPT, *map(str, command)]
    result = subprocess.run([*map(str, started)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "all measured" in result.stdout
    return out, command


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_batch_of_every_method_is_a_line(lines):
    found = read(lines[0])
    assert len(found) == 2 * 2 * 4 and not any("error" in line for line in found)
    assert [line["first"] for line in found] == [0] * 8 + [2] * 8, "the first batch comes first"
    by_worth = ["full", "snapkv/uniform", "snapkv/adakv", "keydiff/uniform"]
    assert [line["method"] for line in found[:8:2]] == by_worth, "what says most comes first"
    assert {len(line["scores"]) for line in found if line["first"] == 2} == {1}


def test_the_tables_have_all_samples_and_differences(lines):
    with lines[0].with_suffix(".csv").open(newline="") as file:
        rows = {(row["task"], row["method"]): row for row in csv.DictReader(file)}
    assert rows["all", "full"]["n"] == "6" and rows["key-value", "snapkv/adakv"]["n"] == "3"
    assert rows["all", "snapkv/adakv"]["minus_uniform"] != "" == rows["all", "keydiff/uniform"]["minus_uniform"]
    assert float(rows["all", "snapkv/uniform"]["bytes_of_full"]) < 0.6
    page = lines[0].with_suffix(".md").read_text()
    assert "## question-agnostic" in page and "| full | 1 |" in page


@pytest.mark.usefixtures("alone")
def test_a_run_goes_on_and_its_clock_ends_it(lines, tmp_path, monkeypatch, capsys):
    import task_table

    out, command = tmp_path / "rows.jsonl", [str(part) for part in lines[1]]
    out.write_text("\n".join(lines[0].read_text().splitlines()[:15]) + "\n{broken")
    command[command.index("--out") + 1] = str(out)
    monkeypatch.setattr(sys, "argv", ["task_table.py", *command, "--seconds", "0"])
    task_table.main()
    assert "1 batches are left" in capsys.readouterr().out
    monkeypatch.setattr(task_table, "measured", lambda *given: {"error": "RuntimeError: no"})
    monkeypatch.setattr(sys, "argv", ["task_table.py", *command])
    task_table.main()
    assert "no" in capsys.readouterr().out and "error" in json.loads(out.read_text().splitlines()[-1])
    again = {"scores": [1.0], "metric": "m", "bytes": 1, "dense_bytes": 2, "uniform": "u", "entries": 1, "seconds": 0.1}
    monkeypatch.setattr(task_table, "measured", lambda *given: again)
    task_table.main()
    assert json.loads(out.read_text().splitlines()[-1])["scores"] == [1.0], "what failed is tried again"
    monkeypatch.setattr(sys, "argv", ["task_table.py", "--table", str(out)])
    task_table.main()
    assert "| snapkv/adakv | 0.5 |" in out.with_suffix(".md").read_text()


@pytest.fixture
def alone(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    yield
    for name in ("task_table", "shared", "basics"):
        sys.modules.pop(name, None)
