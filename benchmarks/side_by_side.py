"""Several kvpolicy commands at once, and their results in one file: for tables of many rows on one GPU.

A row waits for Python as much as for the GPU, so a few processes together take less time than one after another. More
than four are slower again: where a process waits for the device, it waits for all others' turns.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from kvpolicy import load_plan, save_plan
from kvpolicy.comparison.quality import summary
from kvpolicy.comparison.results_file import Comparison, load_comparison, save_comparison
from kvpolicy.report.comparison_tables import markdown

Command = Sequence[str | Path | float]
KVPOLICY = [sys.executable, "-c", "from kvpolicy.cli import main; main()"]


def run(commands: dict[str, Command], folder: Path, processes: int) -> None:
    """Runs every command inside `folder`, `processes` at a time, with its output in NAME.log. None stops another."""

    def one(item: tuple[str, Command]) -> None:
        name, command = item
        with (folder / f"{name}.log").open("w") as log:
            given = [*KVPOLICY, *map(str, command)]
            code = subprocess.run(given, cwd=folder, stdout=log, stderr=log, check=False).returncode
        print(f"{name}: {'done' if code == 0 else f'failed with {code}, see {name}.log'}", flush=True)

    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(one, commands.items()))


def table_of_tasks(options: argparse.Namespace, tasks: Command, methods: Sequence[str], name: str = "tasks") -> None:
    """Runs `task_table.py` inside the folder `options.out`, where plans go by their file's name: NAME.jsonl there."""
    command = ["--model", reachable(options.model), "--device", options.device, "--dtype", options.dtype, *tasks]
    command += ["--context", options.context, "--limit", options.limit, "--batch-size", options.batch_size]
    command += ["--methods", *methods, "--retentions", *options.retentions, "--out", f"{name}.jsonl"]
    script = Path(__file__).resolve().with_name("task_table.py")
    subprocess.run([sys.executable, str(script), *map(str, command)], cwd=options.out, check=True)


def tables_of_tasks(
    options: argparse.Namespace, parts: Mapping[str, tuple[Command, Sequence[str]]], processes: int
) -> None:
    """A table for each part, `processes` at a time; of one that fails its exit status is printed, and the others go on.

    parts: by the file's name, what `table_of_tasks` takes for it
    """

    def one(name: str) -> None:
        tasks, methods = parts[name]
        try:
            table_of_tasks(options, tasks, methods, name)
        except subprocess.CalledProcessError as error:
            print(f"{name}: ended with {error.returncode}", flush=True)

    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(one, parts))


def each_as(option: str, values: Iterable[float]) -> list[str | float]:
    """An option given once for each value."""
    return [part for value in values for part in (option, value)]


def reachable(model: str) -> str:
    """A model's name, or where its file is from any folder."""
    return str(Path(model).resolve()) if Path(model).exists() else model


def missing(tunes: dict[str, Command], folder: Path) -> dict[str, Command]:
    """The searches whose plans are not in the folder yet; one that was begun there goes on."""
    commands = {}
    for name, tune in tunes.items():
        if not (folder / f"{name}.json").exists():
            again = ["--resume"] if (folder / f"{name}.json.study").exists() else []
            commands[name] = [*tune, *again, "--out", f"{name}.json"]
    return commands


def merge_rows(parts: Sequence[Path], out: Path) -> Comparison:
    """One comparison of the rows of several, and its page beside it. Rows that several have must agree."""
    found = [load_comparison(path) for path in parts if path.exists()]
    about = found[0].about
    if Path(about["model"]).is_absolute():
        about |= {"model": Path(about["model"]).name}  # without the folder of one machine
    merged = Comparison(found[0].settings, about)
    for comparison in found:
        if comparison.settings != merged.settings:
            sys.exit(f"the parts of {out} were made under different settings")
        for key, row in comparison.rows.items():
            if key in merged.rows and row.error is None and merged.rows[key].losses != row.losses:
                print(f"{key}: two parts measured different losses", flush=True)
            merged.rows.setdefault(key, row)
    save_comparison(merged, out, {"summary": summary(merged)})
    out.with_suffix(".md").write_text(markdown(merged), encoding="utf-8")
    return merged


def merge_levels(parts: Sequence[Path], out: Path) -> None:
    """One plan of the levels of several that differ in nothing else, largest first; none where all are missing."""
    plans = [load_plan(path) for path in parts if path.exists()]
    if not plans:
        return
    spent = [each for plan in plans for each in plan.provenance["calibration"] if each["retention"] is not None]
    levels = sorted((level for plan in plans for level in plan.levels), key=lambda level: -level.retention)
    more = {"calibration": [plans[0].provenance["calibration"][0], *spent]}
    save_plan(replace(plans[0], levels=tuple(levels), provenance=plans[0].provenance | more), out)
