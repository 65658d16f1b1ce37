"""Every eviction policy under three allocations: which of them still answer.

    python benchmarks/policy_table.py --model qwen05.gguf --out benchmarks/results/passkey_h200

Passkey prompts of 4096 tokens, 50 of them, 30 and 10 % kept, equal measured bytes. Writes OUT.json and OUT.md, and the
parts in the folder OUT.parts, which a later run goes on with. Give a model that finds the keys with the full cache.
"""

from __future__ import annotations

from pathlib import Path

from shared import command_line
from side_by_side import Command, each_as, merge_rows, reachable, run

POLICIES = (
    "kvzip", "h2o", "tova", "corm", "r_kv", "kv_compress", "snapkv", "expected_attention", "keydiff", "l2norm",
    "streaming", "random",
)  # fmt: skip
ALLOCATORS = ("uniform", "pyramid", "adakv")


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="beginning of the files' names: OUT.json, OUT.md")
    parser.add_argument("--model", required=True)
    parser.add_argument("--task", default="passkey")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--limit", type=int, default=50)
    parser.add_argument("--retention", type=float, nargs="+", default=[0.3, 0.1])
    parser.add_argument("--policies", nargs="+", default=POLICIES)
    parser.add_argument("--batch-size", type=int, default=25)
    parser.add_argument("--processes", type=int, default=3)
    options = parser.parse_args()
    folder = options.out.with_name(options.out.name + ".parts")
    folder.mkdir(parents=True, exist_ok=True)
    commands: dict[str, Command] = {}
    for policy in options.policies:
        commands[policy] = [
            "compare", "--no-timing", *(f"{policy}/{allocator}" for allocator in ALLOCATORS), "--task", options.task,
            "--model", reachable(options.model), *each_as("-r", options.retention),
            "--context", options.context, "--limit", options.limit, "--batch-size", options.batch_size,
            "--out", f"{policy}.json",
        ]  # fmt: skip
    run(commands, folder, options.processes)
    parts = [folder / f"{policy}.json" for policy in options.policies]
    merge_rows(parts, options.out.with_suffix(".json"))


if __name__ == "__main__":
    main()
