"""Writes the tables of tasks on a GPU into the docs from benchmarks/results. `--check` fails where they differ.

A table stands between `<!-- tasks: NAME -->` and `<!-- tasks: end -->`. Scores are percent; a gain is the paired
difference to uniform budgets in points, with its 95 % bootstrap interval.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from make_formats import table
from recipe import TASKS, differences
from task_lines import read_lines, table_rows

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results"
PAGES = [DOCS / "benchmarks.md", DOCS / "results.md", DOCS / "how-to" / "choose-a-method.md"]
PLACE = re.compile(r"(<!-- tasks: ([a-z, ]+\w) -->\n).*?(<!-- tasks: end -->)", re.DOTALL)
RULER = tuple(f"ruler/{name}" for name in ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe"))
LEVELS, RECIPE_LEVELS = (0.5, 0.25, 0.125), (0.25, 0.125)
QUESTIONS = ("agnostic", "aware")
GRID = [(question, kept) for question in QUESTIONS for kept in RECIPE_LEVELS]
PLACES = [f"{question}, {100 * kept:g} %" for question, kept in GRID]
PARTS = {"snapkv/uniform@int8": "int8", "plan.json": "plan", "plan.json@int8": "plan@int8"}
NO_NEEDLES = ("ruler/vt", "ruler/fwe", "scbench/vt")
SOURCES = {
    "full": "full cache",
    "snapkv/uniform": "nothing: uniform",
    "novels.json": "novels",
    "needles.json": "needles",
    "answers.json": "answers of `vt`",
}
WHOLE = 400  # prompts of a task that a recipe is judged by

Row = dict[str, Any]


def lines(*names: str) -> list[Row]:
    found = (read_lines(path) for name in names for path in sorted(RESULTS.glob(name)))
    return [line for each in found for line in each.values() if "scores" in line]


@cache
def ruler() -> dict[tuple[Any, ...], Row]:
    """By question, method, retention and task."""
    return by_place(table_rows(lines("ruler_h200.jsonl")))


@cache
def recipe() -> dict[tuple[Any, ...], Row]:
    """The gains of the recipe and of its halves, all over uniform budgets in 16 bits."""
    return by_place(differences(RESULTS / "recipe_h200"))


@cache
def recipe_scores(*tasks: str) -> dict[tuple[Any, ...], Row]:
    own = [line | {"uniform": "snapkv/uniform"} for line in lines("recipe_h200/*.jsonl") if line["task"] in tasks]
    return by_place(table_rows(own))


@cache
def transfer() -> dict[tuple[Any, ...], Row]:
    return by_place(table_rows(lines("transfer_h200/tasks.jsonl")))


def by_place(rows: list[Row]) -> dict[tuple[Any, ...], Row]:
    return {(row["question"], row["method"], row["retention"], row["task"]): row for row in rows}


def points(value: float, digits: int = 1) -> float:
    """Rounded first, so that the last bits of a sum, which differ between machines, do not decide on a half."""
    return round(round(100 * value, 6), digits) + 0.0


def signed(value: float) -> str:
    return f"{points(value):+.1f}" if points(value) else "0.0"


def gain(row: Row, least: int = 0) -> str:
    """With its interval, and n where it is of fewer than `least`."""
    mean, low, high = (row[f"minus_{name}"] for name in ("uniform", "low", "high"))
    said = signed(mean)
    if not points(low) == points(mean) == points(high):
        said += f" ({points(low):.1f} to {points(high):.1f})"
    return said + (f", n = {row['pairs']}" if row["pairs"] < least else "")


def bold(said: str, condition: bool) -> str:
    return f"**{said}**" if condition else said


def told(row: Row) -> bool:
    """Whether the interval leaves out 0."""
    return points(row["minus_low"], 6) > 0 or points(row["minus_high"], 6) < 0


def short(task: str) -> str:
    return f"`{task.removeprefix('ruler/')}`"


def named(method: str) -> str:
    policy, _, budgets = method.partition("/")
    kinds = {"": "", "uniform": "", "adakv": ", `adakv`"}
    return f"`{policy}`{kinds.get(budgets, ', learned')}"


def head(first: str) -> list[str]:
    return [first, *(f"{question}: {100 * kept:g} %" for question in QUESTIONS for kept in LEVELS)]


def means() -> str:
    """Of RULER's tasks: the full cache, what was measured at all levels, and the rest; each by its best at 25 %."""
    rows = {key[:3]: row["score"] for key, row in ruler().items() if key[3] == "all"}
    names = [name for name in dict.fromkeys(key[1] for key in rows) if name != "full" and not name.endswith("/adakv")]

    def place(name: str) -> tuple[bool, float]:
        return (QUESTIONS[0], name, 0.5) not in rows, -max(rows[question, name, 0.25] for question in QUESTIONS)

    best = {
        (q, kept): max(rows[q, name, kept] for name in names if (q, name, kept) in rows)
        for q in QUESTIONS
        for kept in LEVELS
    }
    body = [["full cache", *(cell for q in QUESTIONS for cell in (f"{100 * rows[q, 'full', 1.0]:.0f}", "", ""))]]
    for name in sorted(names, key=place):
        cells = [(q, kept, rows.get((q, name, kept))) for q in QUESTIONS for kept in LEVELS]
        shown = [
            "" if score is None else bold(f"{100 * score:.0f}", score == best[q, kept]) for q, kept, score in cells
        ]
        body.append([named(name), *shown])
    return table(head("policy"), body)


def budgets() -> str:
    """What other budgets gain under the same policy, over RULER's tasks."""
    rows = {key[:3]: row for key, row in ruler().items() if key[3] == "all" and "minus_low" in row}
    names = sorted(dict.fromkeys(key[1] for key in rows), key=lambda name: not name.endswith(".json"))
    body = []
    for name in names:
        own = [rows[question, name, kept] for question in QUESTIONS for kept in LEVELS]
        body.append([named(name), *(bold(gain(row), told(row)) for row in own)])
    return table(head("policy, budgets"), body)


def recipe_tasks(question: str) -> str:
    """Bold where the lower bound is below what is allowed."""
    rows, body = recipe(), []
    for task in (*TASKS, "all"):
        own = [rows[question, method, kept, task] for kept in RECIPE_LEVELS for method in PARTS]
        cells = [bold(gain(row, WHOLE), not row["holds"]) for row in own]
        body.append([short(task) if task != "all" else "all", *cells])
    first, *others = PARTS.values()
    columns = [name for kept in RECIPE_LEVELS for name in (f"{question}, {100 * kept:g} %: {first}", *others)]
    return table(["task", *columns], body)


def verdict() -> str:
    """For each part of the recipe the least lower bound of a task at each place, and in how many it holds."""
    rows, body = recipe(), []
    for method, part in PARTS.items():
        cells, held = [], 0
        for question, kept in GRID:
            own = [rows[question, method, kept, task] for task in TASKS]
            held += sum(row["holds"] for row in own)
            least = min(own, key=lambda row: row["minus_low"])
            few = f", n = {least['pairs']}" if least["pairs"] < WHOLE else ""
            said = f"{signed(least['minus_low'])} ({short(least['task'])}{few})"
            cells.append(bold(said, not least["holds"]))
        body.append([part, *cells, f"{held} of {4 * len(TASKS)}"])
    return table(["", *PLACES, "tasks where it holds"], body)


def together() -> str:
    """Scores of all tasks together, and what is gained where a task has no needle."""
    scores, without = recipe_scores(*TASKS), recipe_scores(*NO_NEEDLES)
    body = [["full cache, %", *(f"{100 * scores[q, 'full', 1.0, 'all']['score']:.1f}" for q, _ in GRID)]]
    for method, said in {"snapkv/uniform": "uniform in 16 bits", **PARTS}.items():
        own = [scores[question, method, kept, "all"] for question, kept in GRID]
        shown = (f"{100 * row['score']:.1f}" if row["n"] == WHOLE * len(TASKS) else "" for row in own)
        body.append([f"{said}, %", *shown])
    for method, said in PARTS.items():
        own = [without[question, method, kept, "all"] for question, kept in GRID]
        body.append([f"without needles, gained by {said}", *(gain(row, WHOLE * len(NO_NEEDLES)) for row in own)])
    return table(["", *PLACES], body)


def choice() -> str:
    """What each part gains over all tasks, for those who choose."""
    said = {
        "snapkv/uniform@int8": "int8, uniform budgets",
        "plan.json": "learned budgets",
        "plan.json@int8": "**learned budgets in int8**",
    }
    whole, body = WHOLE * len(TASKS), []
    for question, when in (("agnostic", "behind the compressed context"), ("aware", "in the prompt")):
        for method, part in said.items():
            own = [recipe()[question, method, kept, "all"] for kept in RECIPE_LEVELS]
            body.append([when, part, *(gain(row, whole) for row in own)])
            when = ""
    return table(["the question", "", *(f"{100 * kept:g} % of the bytes" for kept in RECIPE_LEVELS)], body)


def learned_on() -> str:
    """Budgets by what they were learned on; bold where the interval leaves out 0."""
    rows, body = transfer(), []
    for method, said in SOURCES.items():
        own = [rows[key] for task in (*RULER, "all") for key in rows if key[1] == method and key[3] == task]
        cells = []
        for row in own:
            cell = f"{100 * row['score']:.0f}"
            if "minus_low" in row:
                cell += f", {bold(gain(row), told(row))}"
            cells.append(cell)
        body.append([said, *cells])
    return table(["learned on", *map(short, RULER), "all"], body)


def tables() -> dict[str, Callable[[], str]]:
    """By the names of their places."""
    found: dict[str, Callable[[], str]] = {"means": means, "other budgets": budgets, "learned on": learned_on}
    found |= {f"recipe, {question}": partial(recipe_tasks, question) for question in QUESTIONS}
    return found | {"recipe, verdict": verdict, "recipe, together": together, "recipe, choice": choice}


def page(text: str) -> str:
    """The page with its tables as the results are."""
    return PLACE.sub(lambda found: found[1] + "\n" + tables()[found[2]]() + "\n" + found[3], text)


def main(check: bool) -> None:
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        if not check:
            path.write_text(page(text), encoding="utf-8")
        elif page(text) != text:
            sys.exit(f"{path.relative_to(DOCS.parent)} is not what the results say: python docs/make_tasks.py")


if __name__ == "__main__":
    main("--check" in sys.argv[1:])
