"""Budgets that are measured or learned against heuristic ones, on texts that nothing was searched on.

    python benchmarks/measured_budgets.py --search books.txt --report other.txt wiki.txt --out results/budgets

Plans: learned (each retention by itself) under the window rule and under snapkv, sensitivity with power and with hull,
power on 24 sequences, cosine with baklava. Then every plan, uniform and pyramid under the window rule,
decoded from the first token on, and every policy and plan but the one on 24 sequences behind a prompt, on each text of
--report and on Python's language reference. Writes the plans, OUT/window_TEXT.json, OUT/prompt_TEXT.json and a page
beside each; a later run goes on with what is there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from shared import command_line
from side_by_side import Command, each_as, merge_levels, missing, reachable, run

SCORED = (
    "streaming/uniform", "snapkv/uniform", "snapkv/adakv", "expected_attention/uniform", "expected_attention/adakv",
    "h2o", "tova", "l2norm", "keydiff", "corm", "r_kv", "kvzip", "kv_compress/kv_compress", "quantized/int4",
    "quantized/int2",
)  # fmt: skip


def tunes(options: argparse.Namespace) -> dict[str, Command]:
    """The searches whose plans are not there yet."""
    common = ["--model", reachable(options.model), "--text", options.search.resolve(), "--quiet"]
    common += ["--context", options.context]
    levels = each_as("--retention", options.retention)
    learned = ["tune", "--estimator", "uniform", "--allocator", "learned", "--sequences", options.sequences]
    learned += ["--allocator-param", f"steps={options.steps}"]
    searched = ["tune", "--batch-size", 8, *levels]
    commands: dict[str, Command] = {}
    for name, policy in (("learned", []), ("snapkv_learned", ["--policy", "snapkv"])):
        for r in sorted(options.retention):
            commands[f"{name}_{r:g}"] = [*learned, *policy, "--retention", r, *common]
    power = ["--estimator", "sensitivity", "--allocator", "power", "--trials", options.trials]
    hull = ["--estimator", "sensitivity", "--allocator", "hull"]
    baklava = ["--estimator", "cosine", "--allocator", "baklava", "--trials", options.trials]
    few = options.search_sequences
    for name, sequences, method in (
        ("power", few, power), ("power24", 24, power), ("hull", few, hull), ("baklava", few, baklava),
    ):  # fmt: skip
        commands[name] = [*searched, "--sequences", sequences, *method, *common]
    return missing(commands, options.out)


def comparisons(options: argparse.Namespace, plans: list[str]) -> dict[str, Command]:
    """Two for each text: decoded from the first token on, and behind a prompt, where every policy can be."""
    common = ["--part", "whole", "--context", options.context, "--limit", options.limit, "--batch-size", 8]
    common += ["--model", reachable(options.model), *each_as("-r", options.retention)]
    for_windows = [plan for plan in plans if plan != "snapkv_learned.json"]
    behind = [plan for plan in plans if plan != "power24.json"]
    methods = {
        "window": ["--prefill", 0, "streaming/uniform", "streaming/pyramid", *for_windows],
        "prompt": [*SCORED, *behind, *(f"snapkv/{plan}" for plan in behind if plan in for_windows)],
    }
    texts = {path.stem: ["--text", path.resolve()] for path in options.report} | {"python": []}
    return {
        f"{protocol}_{name}": ["compare", "--no-timing", *common, *text, *asked, "--out", f"{protocol}_{name}.json"]
        for protocol, asked in methods.items()
        for name, text in texts.items()
    }


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder")
    parser.add_argument("--search", type=Path, required=True)
    parser.add_argument("--report", type=Path, nargs="*", default=[])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--retention", type=float, nargs="+", default=[0.5, 0.3, 0.1, 0.05])
    parser.add_argument("--steps", type=int, default=140)
    parser.add_argument("--sequences", type=int, default=48, help="that capacities are learned on")
    parser.add_argument("--search-sequences", type=int, default=8, help="of sensitivity and of trials")
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--limit", type=int, default=16, help="sequences of each text")
    parser.add_argument("--processes", type=int, default=4)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    run(tunes(options), options.out, options.processes)
    for name in ("learned", "snapkv_learned"):
        merge_levels([options.out / f"{name}_{r:g}.json" for r in options.retention], options.out / f"{name}.json")
    plans = [f"{name}.json" for name in ("learned", "snapkv_learned", "power", "power24", "hull", "baklava")]
    run(comparisons(options, [plan for plan in plans if (options.out / plan).exists()]), options.out, options.processes)


if __name__ == "__main__":
    main()
