"""Budgets learned on answers, under policies that score, against those policies' uniform and adakv budgets.

    python benchmarks/retrieval_budgets.py --model qwen05.gguf --text books.txt --out benchmarks/results/retrieval_h200

For each policy: `tune --objective retrieval --allocator learned` at each retention, then passkey and key-value on 100
prompts of another seed, at equal measured bytes. Writes the plans, OUT/TASK.json and OUT/TASK.md; a later run goes on
with what is there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from shared import command_line
from side_by_side import Command, each_as, merge_levels, merge_rows, missing, reachable, run

TASKS = ("passkey", "key-value")
UNSEEN_SEED = 7  # the committed plans were searched on prompts of 0 to 2


def tunes(options: argparse.Namespace) -> dict[str, Command]:
    """The searches whose plans are not there yet."""
    common = ["--objective", "retrieval", "--estimator", "uniform", "--allocator", "learned", "--quiet"]
    common += ["--model", reachable(options.model), "--text", options.text.resolve(), "--context", options.context]
    common += ["--allocator-param", f"steps={options.steps}", "--sequences", options.sequences, "--batch-size", 8]
    commands: dict[str, Command] = {}
    for policy in options.policies:
        for retention in options.retention:
            commands[f"{policy}_{retention:g}"] = ["tune", "--policy", policy, "--retention", retention, *common]
    return missing(commands, options.out)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder")
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True, help="for the perplexity that a plan reports besides")
    parser.add_argument("--policies", nargs="+", default=["snapkv", "expected_attention"])
    parser.add_argument("--retention", type=float, nargs="+", default=[0.3, 0.1])
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--sequences", type=int, default=8, help="four prompts are learned on for each")
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--processes", type=int, default=4)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    run(tunes(options), options.out, options.processes)
    common = ["--seed", UNSEEN_SEED, "--model", reachable(options.model), "--batch-size", 10]
    common += ["--context", options.context, "--limit", options.limit]
    common += each_as("-r", options.retention)
    commands: dict[str, Command] = {}
    for policy in options.policies:
        parts = [options.out / f"{policy}_{retention:g}.json" for retention in options.retention]
        merge_levels(parts, options.out / f"{policy}.json")
        methods = [f"{policy}/uniform", f"{policy}/adakv", f"{policy}.json"]
        for task in TASKS:
            out = ["--out", f"{task}_{policy}.json"]
            commands[f"{task}_{policy}"] = ["compare", "--no-timing", *methods, "--task", task, *common, *out]
    run(commands, options.out, options.processes)
    for task in TASKS:
        merge_rows([options.out / f"{task}_{policy}.json" for policy in options.policies], options.out / f"{task}.json")


if __name__ == "__main__":
    main()
