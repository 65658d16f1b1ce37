r"""Facts found at a number of bytes: learned and equal capacities in 16 bits, int8 and int4, against the full cache.

    python benchmarks/format_facts.py --model qwen05.gguf --plan answers.json novels.json --device cuda \
        --dtype bfloat16 --seconds 280 --out benchmarks/results/format_facts_h200
    python benchmarks/format_facts.py --verdict benchmarks/results/format_facts_h200

Pass keys and key-value items with the question in the prompt (`aware`) or behind what was compressed (`agnostic`). Each
time of the question and each task is a process of its own. A format keeps as many entries as take the bytes of a window
rule's in the model's dtype; `full@int4` keeps all of them.

Writes OUT/QUESTION_TASK.jsonl, a line for each batch of prompts under one method, and OUT/facts.csv and facts.md: the
part that is found, and how much less than the full cache finds, paired by prompt. A later run goes on behind the last
lines, and with another plan beside them.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from itertools import product
from pathlib import Path
from typing import Any

from shared import command_line, write_csv
from side_by_side import Command, tables_of_tasks
from task_lines import read_lines, table_rows

FORMATS = ("model", "int8", "int4")
FULL = "full"
TASKS = ("passkey", "key-value")
UNSEEN_SEED = 7  # the committed plans were searched on prompts of 0 to 2


def methods(policy: str, plans: list[str], formats: list[str]) -> list[str]:
    """Those of one format one behind the other, as prompts are run once for each."""
    coded = [name for name in formats if name != "model"]
    named = [f"{FULL}@{name}" for name in coded]
    for name in formats:
        at = "" if name == "model" else f"@{name}"
        named += [f"{policy}/uniform{at}", *(f"{policy}/{plan}{at}" for plan in plans)]
    return named


def measure(options: argparse.Namespace) -> None:
    names = methods(options.policy, [plan.name for plan in options.plan], options.formats)
    common: Command = ["--seed", options.seed, "--seconds", options.seconds, "--together"]
    parts = {
        f"{question}_{task}": (["--tasks", task, "--questions", question, *common], names)
        for question, task in product(options.questions, options.tasks)
    }
    tables_of_tasks(options, parts, options.processes or len(parts))


def found(folder: Path) -> list[dict[str, Any]]:
    """A row for each time of the question, task and method: what it finds, and less than the full cache, in pairs."""
    lines = [line for path in sorted(folder.glob("*.jsonl")) for line in read_lines(path).values() if "scores" in line]
    if not lines:
        sys.exit(f"{folder} has no measurements")
    levels = {line["retention"] for line in lines if line["method"] != FULL}
    everywhere = [line | {"retention": level} for line in lines if line["method"] == FULL for level in levels]
    lines = everywhere + [line for line in lines if line["method"] != FULL]
    rows = table_rows([line | {"uniform": FULL} for line in lines])
    return [row for row in rows if row["task"] != "all"]


def markdown(rows: list[dict[str, Any]]) -> str:
    page = []
    for question, task, kept in dict.fromkeys((row["question"], row["task"], row["retention"]) for row in rows):
        page += [f"## {task}, question-{question}, {100 * kept:g} % of the bytes", ""]
        page += ["| method | bytes | found | less than the full cache, points | n |", "|---|---|---|---|---|"]
        for row in rows:
            if (row["question"], row["task"], row["retention"]) == (question, task, kept):
                page.append(f"| {' | '.join(cells(row))} |")
        page.append("")
    return "\n".join(page)


def cells(row: dict[str, Any]) -> list[str]:
    less = "" if "minus_low" not in row else lost(row)
    return [row["method"], f"{100 * row['bytes_of_full']:.1f} %", f"{100 * row['score']:.1f} %", less, str(row["n"])]


def lost(row: dict[str, Any]) -> str:
    """Points, and their interval: what was found less."""
    least, mean, most = (-100 * row[f"minus_{name}"] + 0.0 for name in ("high", "uniform", "low"))
    return f"{mean:.1f} ({least:.1f} to {most:.1f})"


def parsed() -> argparse.Namespace:
    parser = command_line(__doc__)
    parser.add_argument("--verdict", type=Path, help="only write the tables of a folder of results")
    parser.add_argument("--out", type=Path, default=Path("format_facts"), help="folder")
    parser.add_argument("--plan", type=Path, nargs="*", default=[], help="whose capacities are used besides equal ones")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--policy", default="snapkv", help="the plans'")
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--questions", nargs="+", default=["aware", "agnostic"])
    parser.add_argument("--retentions", type=float, nargs="+", default=[0.15], help="of the bytes")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--limit", type=int, default=400, help="prompts of each task")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--seed", type=int, default=UNSEEN_SEED)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no new prompts after so long")
    parser.add_argument("--processes", type=int, default=0, help="at once; all if none is said")
    return parser.parse_args()


def main() -> None:
    options = parsed()
    folder = options.verdict or options.out
    if options.verdict is None:
        folder.mkdir(parents=True, exist_ok=True)
        for plan in options.plan:
            if plan.resolve() != (folder / plan.name).resolve():
                shutil.copyfile(plan, folder / plan.name)
        measure(options)
    rows = found(folder)
    write_csv(folder / "facts.csv", rows)
    (folder / "facts.md").write_text(markdown(rows), encoding="utf-8")
    print(markdown(rows))


if __name__ == "__main__":
    main()
