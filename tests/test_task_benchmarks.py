"""Benchmarks around the table of tasks: what they would search, and what a figure of them shows."""

import importlib
import json
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
    options |= {"retentions": [0.5, 0.1], "trials": 2, "steps": 3, "out": tmp_path, "learned": None}
    options |= {"search": ["baklava", "squeeze"]}
    (tmp_path / "squeeze.json").write_text("{}")
    commands = benchmark("longbench").tunes(SimpleNamespace(**options))
    assert list(commands) == ["baklava", "learned_0.5", "learned_0.1"]
    assert commands["learned_0.1"][-4:] == ["--retention", 0.1, "--out", "learned_0.1.json"]
    assert list(benchmark("longbench").tunes(SimpleNamespace(**options | {"learned": "plan.json"}))) == ["baklava"]
    (tmp_path / "squeeze.json").unlink()
    one = SimpleNamespace(**options | {"learned": "plan.json", "search": ["squeeze"]})
    assert list(benchmark("longbench").tunes(one)) == ["squeeze"]


def test_budgets_are_learned_on_each_source_apart(benchmark, tmp_path):
    options = {"model": "smollm2-135m", "text": Path("x"), "device": "cpu", "dtype": "float32", "policy": "snapkv"}
    options |= {"retentions": [0.25], "steps": 3, "sequences": 4, "context": 64, "learned_task": "vt", "out": tmp_path}
    commands = benchmark("transfer").tunes(SimpleNamespace(**options))
    objectives = {name: command[command.index("--objective") + 1] for name, command in commands.items()}
    learned = {"novels_0.25": "perplexity", "needles_0.25": "retrieval", "answers_0.25": "task:ruler/vt"}
    assert objectives == learned


def lines_of(folder, name, method, scores, task="ruler/vt"):
    about = {"model": "m", "dtype": "float32", "context": 8, "limit": 2, "seed": 7, "question": "agnostic"}
    line = about | {"task": task, "method": method, "retention": 0.25, "first": 0, "scores": scores}
    line |= {
        "bytes": 1,
        "dense_bytes": 4,
        "device": "d",
        "uniform": "" if method == "full" else f"snapkv/uniform{'@int8' if '@' in method else ''}",
    }
    with (folder / name).open("a") as file:
        file.write(f"{json.dumps(line)}\n")


def test_a_recipe_is_compared_with_uniform_budgets_in_the_models_dtype(benchmark, tmp_path):
    recipe = benchmark("recipe")
    lines_of(tmp_path, "agnostic_model.jsonl", "snapkv/uniform", [0.5] * 20)
    lines_of(tmp_path, "agnostic_model.jsonl", "plan.json", [0.49] * 20)
    lines_of(tmp_path, "agnostic_model.jsonl", "full", [1.0] * 20)
    lines_of(tmp_path, "agnostic_int8.jsonl", "plan.json@int8", [0.25] * 20)
    rows = {(row["task"], row["method"]): row for row in recipe.differences(tmp_path)}
    plan, coded = rows["ruler/vt", "plan.json"], rows["all", "plan.json@int8"]
    assert plan["minus_uniform"] == pytest.approx(-0.01) and plan["holds"]
    assert coded["minus_uniform"] == pytest.approx(-0.25) and not coded["holds"]
    page = recipe.markdown(list(rows.values()))
    assert "| ruler/vt | **-25.0 (-25.0 to -25.0), n = 20** | -1.0 (-1.0 to -1.0), n = 20 |" in page


def test_the_figure_has_the_papers_tasks_first_and_is_drawn_from_what_is_there(benchmark, tmp_path):
    for task in ("trec_e", "triviaqa_e"):
        lines_of(tmp_path, f"{task}.jsonl", "snapkv/uniform", [0.5, 1.0], task=f"longbench/{task}")
    longbench, drawn = benchmark("longbench"), []
    longbench.figure = lambda rows, about: (
        drawn.append((rows, about)) or SimpleNamespace(savefig=lambda *given, **how: 0)
    )
    longbench.draw_all(tmp_path)
    ((rows, about),) = drawn
    assert [row["task"] for row in rows] == ["longbench/triviaqa_e", "all", "longbench/trec_e"]
    assert about.startswith("m, the first rows") and "no LongBench score" in about


def test_what_a_recipe_measures_is_the_policy_with_and_without_plan_and_format(benchmark):
    recipe = benchmark("recipe")
    assert recipe.methods("snapkv", "model") == ["snapkv/uniform", "plan.json"]
    assert recipe.methods("snapkv", "int8") == ["snapkv/uniform@int8", "plan.json@int8"]


def test_a_recipe_draws_the_prompts_of_each_seed(benchmark, tmp_path, monkeypatch):
    recipe, asked = benchmark("recipe"), []
    monkeypatch.setattr(recipe, "tables_of_tasks", lambda options, parts, processes: asked.append(parts))
    monkeypatch.setattr(sys, "argv", ["recipe.py", "--out", str(tmp_path)])
    recipe.measure(recipe.parsed())
    names = ["agnostic_int8", "agnostic_model", "aware_int8", "aware_model"]
    assert [sorted(parts) for parts in asked] == [names, names]
    seeds = [command[command.index("--seed") + 1] for parts in asked for command, _ in parts.values()]
    assert seeds == [7] * 4 + [8] * 4
    full = {name: "--without-full" not in command for name, (command, _) in asked[0].items()}
    assert full == dict(zip(names, [False, True] * 2, strict=True))


@pytest.mark.parametrize("together", [False, True])
def test_other_budgets_come_behind_all_uniform_ones_or_together_with_them(benchmark, together):
    options = {"methods": ["snapkv/uniform", "snapkv/adakv"], "others": None, "full": False, "together": together}
    options |= {"retentions": [0.5], "questions": ["aware"], "tasks": ["a", "b"], "limit": 1, "batch_size": 1}
    found = [(task, len(rows)) for task, _, rows in benchmark("task_table").batches(SimpleNamespace(**options))]
    assert found == ([("a", 2), ("b", 2)] if together else [("a", 1), ("b", 1)] * 2)


def test_facts_are_compared_with_the_full_cache_in_pairs(benchmark, tmp_path):
    facts = benchmark("format_facts")
    lines_of(tmp_path, "agnostic_passkey.jsonl", "full", [1.0, 0.0] * 10, task="passkey")
    lines_of(tmp_path, "agnostic_passkey.jsonl", "snapkv/answers.json@int4", [0.5, 0.0] * 10, task="passkey")
    rows = facts.found(tmp_path)
    assert [(row["method"], row["retention"], row["score"]) for row in rows] == [
        ("full", 0.25, 0.5),
        ("snapkv/answers.json@int4", 0.25, 0.25),
    ]
    assert "| snapkv/answers.json@int4 | 25.0 % | 25.0 % | 25.0 (" in facts.markdown(rows)
    assert "| full | 25.0 % | 50.0 % |  | 20 |" in facts.markdown(rows)


def test_facts_are_asked_of_one_format_after_the_other(benchmark):
    asked = benchmark("format_facts").methods("snapkv", ["a.json"], ["model", "int4"])
    assert asked == ["full@int4", "snapkv/uniform", "snapkv/a.json", "snapkv/uniform@int4", "snapkv/a.json@int4"]
