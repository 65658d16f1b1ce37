"""How long a prompt takes to be read and compressed, against the dense cache: by kind of policy.

    python benchmarks/prefill.py --out benchmarks/results/prefill_h200

Llama-3-8B's shape, random bf16 weights, prompts of random tokens, batch 1, 30 % kept. A window rule needs nothing
from a prompt, observation windows the attention of its last queries, column sums that of all. A prompt comes in one
forward, and in chunks (`chunk`, 0 for the whole). The caches take turns; each time is that of all forwards and their
wait, `ratio` the median over that of the dense cache in the same chunks. One prompt of each length runs first: cuDNN
plans its attention at a length that it has not seen.
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
DENSE = ("DynamicCache", "dense")
POLICIES = (("streaming", "window rule"), ("snapkv", "observation window"), ("h2o", "column sums"))
LONG, OF_LONG = 65536, POLICIES[1:2]  # beyond it a prompt takes 12 s
CHUNKED = ("DynamicCache", "streaming", "snapkv")
CHUNK = 4096

Row = tuple[str, str, int]  # cache, kind, chunk


def caches(model: Any, context: int) -> dict[Row, Callable[[], Any]]:
    """What makes each cache, by its name, its kind, and the chunks in which it is given the prompt."""
    make: dict[tuple[str, str], Callable[[], Any]] = {DENSE: lambda: DynamicCache(config=model.config)}
    for policy, kind in POLICIES:
        options = {"policy": policy, "allocator": "uniform", "retention": KEPT, "context_length": context}
        make[policy, kind] = partial(kvpolicy.new_cache, model, **options)
    whole = (DENSE, *(OF_LONG if context > LONG else POLICIES))
    made = {(*key, 0): make[key] for key in whole}
    return made | {(*key, CHUNK): new for key, new in make.items() if key[0] in CHUNKED}


def read(model: Any, ids: torch.Tensor, cache: Any, chunk: int) -> None:
    for part in ids.split(chunk or ids.shape[1], 1):
        model(part, **with_cache(model, cache), use_cache=True, logits_to_keep=1)


@torch.no_grad()
def measure(model: Any, context: int, repeats: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(context)
    prompt = torch.randint(0, model.config.vocab_size, (1, context), generator=generator).cuda()
    made = caches(model, context)
    seconds: dict[Row, list[float]] = {key: [] for key in made}
    peaks = {}
    for turn in range(repeats + 1):  # in the first one the others compile their kernels, behind a short prompt
        for key, make in made.items():
            ids = prompt if turn or key == (*DENSE, 0) else prompt[:, : 2 * CHUNK]
            kvpolicy.detach(model)
            clean()
            took, _ = timed(partial(read, model, ids, make(), key[2]))
            if turn:
                seconds[key].append(took)
            peaks[key] = torch.cuda.max_memory_allocated()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    rows = []
    for (name, kind, chunk), times in seconds.items():
        median = statistics.median(times)
        rows.append({
            "cache": name, "kind": kind, "chunk": chunk, "context": context, "kept": 1.0 if kind == "dense" else KEPT,
            "seconds": round(median, 4), "least": round(min(times), 4), "most": round(max(times), 4),
            "ratio": round(median / statistics.median(seconds[*DENSE, chunk]), 4),
            **memory(peaks[name, kind, chunk], weights),
            "n": len(times), "seed": context,
            "model": described(model),
            **versions("transformers", "kvpolicy"), **machine(),
        })  # fmt: skip
        print(*list(rows[-1].values())[:9], sep="\t", flush=True)
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
