"""How long a prompt takes to be read and compressed, against the dense cache: by kind of policy.

    python benchmarks/prefill.py --out benchmarks/results/prefill_h200

Llama-3-8B's shape, random bf16 weights, prompts of random tokens, batch 1, 30 % kept. A window rule needs nothing
from a prompt, observation windows the attention of its last queries, column sums that of all. The caches take turns;
each time is that of one forward and its wait, `ratio` the median over the dense one's. One prompt of each length runs
first: cuDNN plans its attention at a length that it has not seen.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from decode_graph import clean, machine, memory
from shapes import described, long_llama
from shared import command_line, timed, versions, write_csv
from transformers import DynamicCache

import kvpolicy
from kvpolicy.integrations.transformers import with_cache

KEPT = 0.3
POLICIES = (  # name, kind, whether at fixed addresses
    ("streaming", "window rule", True), ("streaming", "window rule", False), ("snapkv", "observation window", True),
    ("snapkv", "observation window", False), ("h2o", "column sums", False),
)  # fmt: skip
LONG, OF_LONG = 65536, (("snapkv", "observation window", True),)  # beyond it a prompt takes 12 s


def caches(model: Any, context: int) -> dict[tuple[str, str], Callable[[], Any]]:
    """What makes each cache, by its name and kind."""
    made: dict[tuple[str, str], Callable[[], Any]] = {
        ("DynamicCache", "dense"): lambda: DynamicCache(config=model.config)
    }
    for policy, kind, static in OF_LONG if context > LONG else POLICIES:
        options = {"policy": policy, "allocator": "uniform", "retention": KEPT, "context_length": context}
        name = f"{policy}, static" if static else policy
        made[name, kind] = partial(kvpolicy.new_cache, model, static=static, **options)
    return made


@torch.no_grad()
def measure(model: Any, context: int, repeats: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(context)
    prompt = torch.randint(0, model.config.vocab_size, (1, context), generator=generator).cuda()
    made = caches(model, context)
    dense, *_ = made
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in made}
    peaks = {}
    for turn in range(repeats + 1):  # in the first one the others compile their kernels, behind a short prompt
        for key, make in made.items():
            ids = prompt if turn or key == dense else prompt[:, :4096]
            kvpolicy.detach(model)
            clean()
            cache = make()
            took, _ = timed(partial(model, ids, **with_cache(model, cache), use_cache=True, logits_to_keep=1))
            if turn:
                seconds[key].append(took)
            peaks[key] = torch.cuda.max_memory_allocated()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    rows = []
    for (name, kind), times in seconds.items():
        median = statistics.median(times)
        rows.append({
            "cache": name, "kind": kind, "context": context, "kept": 1.0 if kind == "dense" else KEPT,
            "seconds": round(median, 4), "least": round(min(times), 4), "most": round(max(times), 4),
            "ratio": round(median / statistics.median(seconds[dense]), 4), **memory(peaks[name, kind], weights),
            "n": len(times), "seed": context,
            "model": described(model),
            **versions("transformers", "kvpolicy"), **machine(),
        })  # fmt: skip
        print(*list(rows[-1].values())[:8], sep="\t", flush=True)
    return rows


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--out", required=True, help="beginning of the file's name: OUT.csv")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--contexts", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--repeats", type=int, nargs="+", default=[5, 1], help="one for each context")
    options = parser.parse_args()
    model, rows = long_llama(options.layers), []
    for context, repeats in zip(options.contexts, options.repeats, strict=True):
        rows += measure(model, context, repeats)
        write_csv(f"{options.out}.csv", rows)


if __name__ == "__main__":
    main()
