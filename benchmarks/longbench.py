r"""Tasks of LongBench over what is compressed away: BaKlaVa's and other budgets, in one figure.

    python benchmarks/longbench.py --model qwen05.gguf --data longbench --text books.txt --device cuda \
        --dtype bfloat16 --out benchmarks/results/longbench_h200
    python benchmarks/longbench.py --draw benchmarks/results/longbench_h200

The paper's four tasks and four more, from local files: the first rows of a file are no random sample, so that a mean of
them is no LongBench score. Plans are searched (baklava, squeeze) or learned (under snapkv) on --text, each level by
itself where it is learned; then `task_table.py` measures them, uniform budgets under streaming and snapkv, and the full
cache, each task in a process of its own. Writes the plans, OUT/TASK.jsonl with its tables, and OUT/longbench.png; a
later run goes on with what is there.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

import matplotlib
from shared import command_line
from side_by_side import Command, each_as, merge_levels, missing, reachable, run, tables_of_tasks
from task_lines import read_lines, table_rows

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

PAPERS = ("triviaqa", "repobench-p", "2wikimqa", "gov_report")
MORE = ("qmsum", "hotpotqa_e", "trec_e", "passage_retrieval_en_e")
METHODS = {  # colour, name
    "baklava.json": ("#c44e52", "BaKlaVa (streaming)"),
    "squeeze.json": ("#e08e45", "SqueezeAttention (streaming)"),
    "streaming/uniform": ("0.55", "streaming, uniform"),
    "snapkv/uniform": ("#8fbbd9", "snapkv, uniform"),
    "learned.json": ("#1b6ca8", "snapkv, learned"),
}


def tunes(options: argparse.Namespace) -> dict[str, Command]:
    """The searches whose plans are not there yet."""
    common = ["--model", reachable(options.model), "--text", options.text.resolve(), "--device", options.device]
    common += ["--dtype", options.dtype, "--context", options.search_context, "--quiet"]
    levels = each_as("--retention", options.retentions)
    searched = ["tune", *levels, "--trials", options.trials, "--sequences", 8, *common]
    commands: dict[str, Command] = {
        "baklava": [*searched, "--estimator", "cosine", "--allocator", "baklava"],
        "squeeze": [*searched, "--estimator", "layer_cosine", "--allocator", "squeeze"],
    }
    learned = ["tune", "--policy", "snapkv", "--estimator", "uniform", "--allocator", "learned", "--sequences", 16]
    learned += ["--allocator-param", f"steps={options.steps}", *common]
    commands = {name: command for name, command in commands.items() if name in options.search}
    for kept in options.retentions if options.learned is None else ():
        commands[f"learned_{kept:g}"] = [*learned, "--retention", kept]
    return missing(commands, options.out)


def figure(rows: list[dict[str, Any]], about: str) -> plt.Figure:
    """One part for each task. rows: as `table_rows` gives them"""
    tasks = list(dict.fromkeys(row["task"] for row in rows if row["task"] != "all"))
    columns = min(len(tasks), 4)
    picture, axes = plt.subplots(
        -(-len(tasks) // columns), columns, figsize=(3.1 * columns, 2.6 * -(-len(tasks) // columns)),
        layout="constrained", sharex=True, squeeze=False,
    )  # fmt: skip
    for axis in axes[-1]:
        axis.set_xlabel("compressed away", fontsize=8)
    for axis, task in zip(axes.flat, tasks, strict=False):
        draw(axis, [row for row in rows if row["task"] == task])
    for axis in axes.flat[len(tasks) :]:
        axis.axis("off")
    lines = {name: line for axis in axes.flat for line, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    picture.legend([*lines.values()], [*lines], loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    picture.suptitle(about, fontsize=9)
    return picture


def draw(axis: Axes, rows: list[dict[str, Any]]) -> None:
    """The score of each method over what is evicted, with 95 % intervals of those with a plan; uniform budgets are
    dashed, so that what lies under them is seen, and the full cache is a line.
    """
    for method, (colour, said) in METHODS.items():
        own = sorted((row for row in rows if row["method"] == method), key=lambda row: -row["retention"])
        if not own:
            continue
        x, y = [1 - row["retention"] for row in own], [100 * row["score"] for row in own]
        planned = method.endswith(".json")
        axis.plot(x, y, "-" if planned else "--", color=colour, marker="o", markersize=3, label=said)
        if planned:
            axis.fill_between(x, *([100 * row[end] for row in own] for end in ("low", "high")), color=colour, alpha=0.1)
    for row in rows:
        if row["method"] == "full":
            axis.axhline(100 * row["score"], color="black", linewidth=1, linestyle=":", label="full cache")
    axis.set_title(f"{rows[0]['task'].removeprefix('longbench/')}, n = {rows[0]['n']}", fontsize=9)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def parsed() -> argparse.Namespace:
    parser = command_line(__doc__)
    parser.add_argument("--draw", type=Path, help="only draw the figure of a folder of results")
    parser.add_argument("--out", type=Path, default=Path("longbench_results"), help="folder")
    parser.add_argument("--data", type=Path, help="folder of NAME.jsonl and dataset2prompt.json")
    parser.add_argument("--text", type=Path, help="that budgets are searched and learned on")
    parser.add_argument("--search", nargs="*", default=["baklava", "squeeze"], help="budgets to search, of these two")
    parser.add_argument("--learned", type=Path, help="a plan for snapkv, instead of learning one for each level")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tasks", nargs="+", default=[*PAPERS, *MORE])
    parser.add_argument("--retentions", type=float, nargs="+", default=[0.7, 0.5, 0.3, 0.2, 0.1])
    parser.add_argument("--context", type=int, default=8192, help="longer prompts lose their middle")
    parser.add_argument("--limit", type=int, default=28, help="rows of each task, where there are so many")
    parser.add_argument("--batch-size", type=int, default=28)
    parser.add_argument("--search-context", type=int, default=4096)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--processes", type=int, default=2, help="searches, and then tasks, at once")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="measure no new prompts after so long")
    return parser.parse_args()


def main() -> None:
    options = parsed()
    if options.draw is None:
        options.out.mkdir(parents=True, exist_ok=True)
        run(tunes(options), options.out, options.processes)
        if options.learned is not None:
            shutil.copyfile(options.learned, options.out / "learned.json")
        levels = [options.out / f"learned_{kept:g}.json" for kept in options.retentions]
        merge_levels(levels, options.out / "learned.json")
        measure(options)
    draw_all(options.draw or options.out)


def measure(options: argparse.Namespace) -> None:
    methods = [name for name in METHODS if not name.endswith(".json") or (options.out / name).exists()]
    common = ["--data", options.data.resolve(), "--questions", "aware", "--seconds", options.seconds]
    parts = {task: (["--tasks", f"longbench/{task}", *common], methods) for task in options.tasks}
    tables_of_tasks(options, parts, options.processes)


def draw_all(folder: Path) -> None:
    lines = [line for path in sorted(folder.glob("*.jsonl")) for line in read_lines(path).values() if "scores" in line]
    if not lines:
        sys.exit(f"{folder} has no measurements")
    papers = [f"longbench/{name}" for name in PAPERS]
    lines.sort(key=lambda line: (line["task"].removesuffix("_e") not in papers, line["task"]))  # the paper's first
    about = f"{lines[0]['model']}, the first rows of LongBench's tasks (no LongBench score), {lines[0]['device']}"
    figure(table_rows(lines), about).savefig(folder / "longbench.png", dpi=130)


if __name__ == "__main__":
    main()
