"""Seconds per decoded token and resident memory: transformers' DynamicCache against kvpolicy's cache.

Speed: the caches take turns in one process (`measure_decode`), fed the same text token by token; the stock cache runs
on the model as it was loaded, with SDPA. Memory: one process for each cache, its resident set before and after a
prompt, and its peak in between.

    python benchmarks/decode_speed.py [--device cpu] [--context 4096] [--out results]
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from shared import command_line, machine, table_of, write_csv

import kvpolicy
from kvpolicy import BudgetPlan, ModelSpec
from kvpolicy.integrations.transformers import with_cache
from kvpolicy.integrations.transformers.probes.decode_cost import measure_decode

KEPT = 0.25
CACHES = ("retention 1", "25 % uniform", "25 % ragged")
NO_CACHE, DENSE = "no cache", "DynamicCache"


def new_cache(model: Any, context: int, name: str) -> Any:
    if name == "retention 1":
        return kvpolicy.new_cache(model, retention=1.0)
    spec = ModelSpec.from_config(model.config)
    table = table_of(spec, KEPT, context, ragged=name.endswith("ragged"))
    return kvpolicy.new_cache(model, BudgetPlan.from_capacities(spec, table, context_length=context))


def load(options: argparse.Namespace) -> tuple[Any, torch.Tensor]:
    """(model, ids [1, context + new tokens])."""
    model, tokenizer = kvpolicy.load_model(options.model, device=options.device, dtype=options.dtype)
    ids = kvpolicy.read_corpus(tokenizer).sequences("search", 1, options.context + options.new_tokens)
    return model, ids.to(options.device)


def speed(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each repeat of each cache, and the medians in every row of a cache."""
    model, ids = load(options)
    makers = {name: lambda name=name: new_cache(model, options.context, name) for name in CACHES}
    costs = measure_decode(model, ids, makers, new_tokens=options.new_tokens, repeats=options.repeats)
    rows = []
    for cost in costs:
        row = {
            "cache": cost.name,
            "ms_per_token": round(1e3 * cost.median_token_seconds, 3),
            "ratio": round(cost.token_ratio(costs[0]), 3),
            "prefill_s": round(cost.median_first_token_seconds, 3),
            "prefill_ratio": round(cost.first_token_ratio(costs[0]), 3),
            "cache_bytes": cost.bytes,
            "entries": cost.entries,
            "entries_seen": cost.entries_seen,
            "ms_of_each_repeat": " ".join(f"{1e3 * seconds:.2f}" for seconds in cost.token_seconds),
            "n": options.repeats,
            "new_tokens": options.new_tokens,
        }
        rows.append(row | facts(options))
        print(*list(rows[-1].values())[:6], sep="\t", flush=True)
    return rows


def memory(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each cache, measured in a process of its own."""
    rows = []
    for name in (NO_CACHE, DENSE, *CACHES):
        command = [sys.executable, __file__, *sys.argv[1:], "--child", name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append({"cache": name, **json.loads(done.stdout.splitlines()[-1]), **facts(options)})
        print(*list(rows[-1].values())[:6], sep="\t", flush=True)
    return rows


@torch.inference_mode()
def child(options: argparse.Namespace) -> None:
    """Prints the resident memory of this process before and after a prompt, in bytes, as JSON."""
    model, ids = load(options)
    prompt = ids[:, : options.context]

    def cache_of(name: str) -> Any:
        if name == NO_CACHE:
            return None
        if name == DENSE:
            return transformers.DynamicCache(config=model.config)
        return new_cache(model, options.context, name)

    def run(count: int) -> Any:
        cache = cache_of(options.child)
        model(prompt[:, :count], **with_cache(model, cache), use_cache=cache is not None, logits_to_keep=1)
        return cache

    run(32)  # libraries are loaded, threads started
    before = resident()
    forget_peak()
    cache = run(options.context)
    highest = peak()
    if options.child == DENSE:
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    else:
        held = 0 if cache is None else cache.nbytes
    after = resident()
    grown = {"rss_growth": after - before, "rss_peak_growth": None if highest is None else highest - before}
    print(json.dumps({"cache_bytes": held, "rss_before": before, "rss_after": after, **grown}))


def resident() -> int:
    """Bytes of this process in memory, once what is free has been given back to the system."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


def forget_peak() -> None:
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int | None:
    """Most bytes that this process has had in memory since `forget_peak`; None where the system does not say."""
    if sys.platform != "linux":
        return None
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))


def facts(options: argparse.Namespace) -> dict[str, Any]:
    """The last columns of both files."""
    about = {"model": options.model, "context": options.context, "dtype": options.dtype}
    return about | machine(options.device, "torch", "transformers", "kvpolicy")


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", help="beginning of the two files' names: OUT_speed.csv, OUT_memory.csv")
    parser.add_argument("--only", choices=["speed", "memory"])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    for what, measure in (("speed", speed), ("memory", memory)):
        if options.only in (None, what) and (what == "speed" or options.device == "cpu"):
            rows = measure(options)
            if options.out:
                write_csv(f"{options.out}_{what}.csv", rows)


if __name__ == "__main__":
    main()
