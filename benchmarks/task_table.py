r"""Policies, allocators and plans on tasks whose prompts are made here, with the question in the prompt and behind it.

    python benchmarks/task_table.py --model DIR --device cuda --dtype bfloat16 --seconds 3000 --out ruler_h200.jsonl
    python benchmarks/task_table.py --table ruler_h200.jsonl

RULER's six tasks that need no files, at 4096 tokens. By default four policies with uniform budgets and with adakv at
0.5, 0.25 and 0.125 kept, and the other policies with uniform budgets at 0.25; name methods as `compare` does, plans too
(`snapkv/plan.json`, at every retention that the plan has). A batch of prompts is run once for each policy, and each of
its budgets goes on with a copy.

One line of JSON for each batch of samples under one method. A run that --seconds ends has measured what says most: of
the first batch, for each time of the question as --questions orders them, first the full cache and uniform budgets,
then other budgets under the same policies; then the policies at 0.25; then all of the next batch. The same command goes
on behind the last line. With the last line, or with --table, OUT.md and OUT.csv are written: means, 95 % intervals, and
the paired difference to uniform budgets.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from shared import command_line, device_name, versions, write_csv
from task_lines import add_line, identity, read_lines, table_rows

import kvpolicy
from kvpolicy.comparison.answers import AnswerTask
from kvpolicy.comparison.methods import FULL, Method, read_asked
from kvpolicy.plugins.registry import registry
from kvpolicy.plugins.task_role import Sample, Task
from kvpolicy.tasks.family import task_of

TASKS = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe")
POLICIES = ("snapkv", "expected_attention", "keydiff", "h2o")
ALLOCATORS = ("uniform", "adakv")
RETENTIONS, ONE_RETENTION = (0.5, 0.25, 0.125), 0.25
_WRAPPERS = ("critical_kv",)  # around another policy, which would have to be named


@dataclass(frozen=True)
class Row:
    """A method at a retention under one time of the question.

    worth: what says most comes first; those of one worth are of one policy, and a batch of prompts is run once for them
    """

    question: str
    method: Method
    kept: float
    worth: tuple[int, ...]


def main() -> None:
    options = parsed()
    if options.table is not None:
        write_tables(options.table)
        return
    begun, left = time.monotonic(), 0
    known = {key for key, line in read_lines(options.out).items() if "scores" in line}  # a failure is tried again
    model, tokenizer = kvpolicy.load_model(options.model, device=options.device, dtype=options.dtype)
    fields = {"data": options.data} if options.data else {}
    roles = {name: task_of(name, fields) for name in options.tasks}
    samples = cache(lambda name: roles[name].samples(tokenizer, options.limit, options.context, options.seed))
    about = {"model": Path(options.model).name, "dtype": str(model.dtype).removeprefix("torch.")}
    about |= {"context": options.context, "limit": options.limit, "seed": options.seed}
    machine = {"device": device_name(options.device), **versions("kvpolicy", "torch", "transformers")}
    for name, first, rows in batches(options):
        keys = [about | place(row) | {"task": name, "first": first} for row in rows]
        due = [(row, key) for row, key in zip(rows, keys, strict=True) if identity(key) not in known]
        if not due or time.monotonic() - begun > options.seconds:
            left += len(due)
            continue
        drawn = samples(name)[first:][: options.batch_size]
        if not drawn:  # a file may have fewer rows
            continue
        task = answer_task(model, tokenizer, rows[0].question, name, roles[name], drawn)
        for row, key in due:
            line = key | measured(task, row.method, row.kept, options.seed) | machine
            add_line(options.out, line)
            said = line["error"] if "error" in line else f"{sum(line['scores']) / len(line['scores']):.3f}"
            what = f"{row.question}, {row.method.name} at {row.kept:g}, {name} from sample {first}"
            print(f"{time.monotonic() - begun:6.0f} s  {what}: {said}", flush=True)
    print(f"{left} batches are left for the next run" if left else "all measured", flush=True)
    write_tables(options.out)


def parsed() -> Any:
    parser = command_line(__doc__)
    parser.add_argument("--table", type=Path, help="only make the tables of a file of results")
    parser.add_argument("--out", type=Path, default=Path("task_table.jsonl"))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tasks", nargs="+", default=[f"ruler/{name}" for name in TASKS])
    parser.add_argument("--data", default="", help="folder of the tasks' files")
    parser.add_argument("--questions", nargs="+", default=["agnostic", "aware"])
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--limit", type=int, default=100, help="samples of each task")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", help="instead of the four policies, at --retentions")
    parser.add_argument("--others", nargs="*", help="policies under uniform budgets at 0.25; default: all others")
    parser.add_argument("--retentions", type=float, nargs="+", default=RETENTIONS)
    parser.add_argument("--without-full", dest="full", action="store_false", help="leave the full cache out")
    parser.add_argument("--together", action="store_true", help="uniform and other budgets from one run of the prompts")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no new prompts after so long")
    return parser.parse_args()


def batches(options: Any) -> Iterator[tuple[str, int, list[Row]]]:
    """Task, first sample, and the rows that share its prompts, in the order of what they are worth."""
    planned = planned_rows(options)
    for first in range(0, options.limit, options.batch_size):
        for _, rows in groupby(planned, key=lambda row: row.worth):
            own = list(rows)
            for name in options.tasks:
                yield name, first, own


def planned_rows(options: Any) -> list[Row]:
    named = options.methods or [f"{policy}/{allocator}" for policy in POLICIES for allocator in ALLOCATORS]
    main = [(method, kept) for method in read_asked(named) for kept in options.retentions if reaches(method, kept)]
    others = options.others
    if others is None:
        used = {method.policy_name for method, _ in main} | set(_WRAPPERS)
        others = [] if options.methods else [name for name in registry.names("policy") if name not in used]
    (full,) = read_asked([FULL])
    rest = [(method, ONE_RETENTION) for method in read_asked([f"{name}/uniform" for name in others])]
    dense = [(full, 1.0)] if options.full else []
    found = [(False, *pair) for pair in [*dense, *main]] + [(True, *pair) for pair in rest]
    policies = list(dict.fromkeys(method.policy_label for _, method, _ in found))
    rows = []
    for turn, question in enumerate(options.questions):
        for is_other, method, kept in found:
            is_split = not (method.is_full or method.is_uniform or options.together)
            worth = (is_other, turn, is_split, policies.index(method.policy_label))
            rows.append(Row(question, method, kept, worth))
    return sorted(rows, key=lambda row: row.worth)


def reaches(method: Method, kept: float) -> bool:
    return method.plan is None or method.plan.level_at(kept) is not None


def place(row: Row) -> dict[str, Any]:
    return {"question": row.question, "method": row.method.name, "retention": row.kept}


def answer_task(
    model: Any, tokenizer: Any, question: Any, name: str, role: Task, samples: Sequence[Sample]
) -> AnswerTask:
    """All samples are one batch, whose dense cache is kept for the next budget: on a GPU a quarter of what is free."""
    size = torch.cuda.mem_get_info(model.device)[0] // 4 if model.device.type == "cuda" else None
    batch = {"question": question, "batch_size": len(samples), "kept_bytes": size}
    return AnswerTask(name, role, model, tokenizer, samples, **batch)


def measured(task: AnswerTask, method: Method, kept: float, seed: int) -> dict[str, Any]:
    """The scores of a batch, or why there are none."""
    begun = time.monotonic()
    tables = cache(lambda context: method.table(task.spec, context, kept, seed, task.dtype))
    try:
        found = task.measure(method, tables)
    except Exception as error:  # one method's failure is a line, and the others go on
        if method.is_full:
            raise
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    memory = found.memory
    figures = {"scores": [1 - loss for loss in found.losses.tolist()], "metric": task.role.metric}
    figures |= {"bytes": memory.bytes, "dense_bytes": memory.dense_bytes, "entries": memory.entries}
    return figures | {"uniform": method.uniform_name, "seconds": round(time.monotonic() - begun, 2)}


def write_tables(path: Path) -> None:
    """OUT.csv, and OUT.md with a table for each time of the question."""
    lines = [line for line in read_lines(path).values() if "scores" in line]
    if not lines:
        sys.exit(f"{path} has no measurements")
    rows = table_rows(lines)
    write_csv(path.with_suffix(".csv"), rows)
    first = lines[0]
    page = [
        f"{first['model']}, {first['dtype']}, prompts of {first['context']} tokens, seed {first['seed']}; "
        f"{first['device']}, torch {first['torch']}, transformers {first['transformers']}. Mean score in %, and its "
        "distance from uniform budgets under the same policy with its 95 % interval, paired by sample."
    ]
    for question in dict.fromkeys(line["question"] for line in lines):
        page += ["", f"## question-{question}", "", *markdown([row for row in rows if row["question"] == question])]
    path.with_suffix(".md").write_text("\n".join(page) + "\n", encoding="utf-8")


def markdown(rows: list[dict[str, Any]]) -> list[str]:
    """Methods down, tasks across."""
    tasks = [*dict.fromkeys(row["task"] for row in rows if row["task"] != "all"), "all"]
    cells = {(row["method"], row["retention"], row["task"]): row for row in rows}
    names = list(dict.fromkeys((row["method"], row["retention"]) for row in rows))
    head = ["method", "kept", *tasks, "all minus uniform", "n", "bytes"]
    table = [" | ".join(["", *head, ""]).strip(), " | ".join(["", *["---"] * len(head), ""]).strip()]
    for method, kept in sorted(names, key=lambda name: -name[1]):
        own = cells[method, kept, "all"]
        scores = [
            f"{100 * cells[method, kept, task]['score']:.1f}" if (method, kept, task) in cells else "" for task in tasks
        ]
        minus = ""
        if "minus_uniform" in own:
            minus = "{:+.1f} ({:+.1f} to {:+.1f})".format(
                *(100 * own[name] for name in ("minus_uniform", "minus_low", "minus_high"))
            )
        cell = [method, f"{kept:g}", *scores, minus, str(own["n"]), f"{100 * own['bytes_of_full']:.1f} %"]
        table.append(" | ".join(["", *cell, ""]).strip())
    return table


if __name__ == "__main__":
    main()
