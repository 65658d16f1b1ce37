r"""Do budgets that were learned on one thing hold for another? Learned on novels, on needles and on a task's answers.

    python benchmarks/transfer.py --model qwen05.gguf --text books.txt --device cuda --dtype bfloat16 \
        --out benchmarks/results/transfer_h200

Under one policy and at each retention by itself: `tune --allocator learned` on a text, on the answers to pass keys and
key-value items, and on the answers of one task. Then `task_table.py` measures the plans, uniform budgets and the full
cache on tasks of which each plan but the last has seen none, and on prompts that none has seen, the question behind the
compressed context. Writes the plans, OUT/tasks.jsonl and its tables; a later run goes on with what is there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from shared import command_line
from side_by_side import Command, merge_levels, missing, reachable, run, table_of_tasks

UNSEEN_SEED = 7  # the committed plans were searched on prompts of 0 to 2
TASKS = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe")


def sources(options: argparse.Namespace) -> dict[str, list[str]]:
    """What budgets are learned on, as options of `tune`."""
    return {
        "novels": ["--objective", "perplexity"],
        "needles": ["--objective", "retrieval"],
        "answers": ["--objective", f"task:ruler/{options.learned_task}", "--question", "agnostic"],
    }


def tunes(options: argparse.Namespace) -> dict[str, Command]:
    """The searches whose plans are not there yet."""
    common = ["--policy", options.policy, "--estimator", "uniform", "--allocator", "learned", "--quiet"]
    common += ["--model", reachable(options.model), "--device", options.device, "--dtype", options.dtype]
    common += ["--text", options.text.resolve(), "--context", options.context, "--sequences", options.sequences]
    common += ["--allocator-param", f"steps={options.steps}"]
    commands: dict[str, Command] = {
        f"{name}_{kept:g}": ["tune", *objective, "--retention", kept, *common]
        for name, objective in sources(options).items()
        for kept in options.retentions
    }
    return missing(commands, options.out)


def parsed() -> argparse.Namespace:
    parser = command_line(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder")
    parser.add_argument("--text", type=Path, required=True, help="novels to learn on")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--policy", default="snapkv")
    parser.add_argument("--learned-task", default="vt", help="of RULER, whose answers are learned on")
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--retentions", type=float, nargs="+", default=[0.25])
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--sequences", type=int, default=8, help="of the text; four prompts are learned on for each")
    parser.add_argument("--limit", type=int, default=100, help="samples of each task")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--processes", type=int, default=3)
    return parser.parse_args()


def main() -> None:
    options = parsed()
    options.out.mkdir(parents=True, exist_ok=True)
    run(tunes(options), options.out, options.processes)
    for name in sources(options):
        merge_levels(
            [options.out / f"{name}_{kept:g}.json" for kept in options.retentions], options.out / f"{name}.json"
        )
    plans = [f"{name}.json" for name in sources(options) if (options.out / f"{name}.json").exists()]
    tasks = [f"ruler/{name}" for name in options.tasks]
    asked = ["--tasks", *tasks, "--questions", "agnostic", "--seed", UNSEEN_SEED]
    table_of_tasks(options, asked, [f"{options.policy}/uniform", *plans])


if __name__ == "__main__":
    main()
