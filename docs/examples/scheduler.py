"""Requests that come one after the other, served at the same memory by `kvpolicy.SlotRunner` and by static batches.

python docs/examples/scheduler.py                                  # a tiny random model, on any machine
python docs/examples/scheduler.py --model smollm2-135m
python docs/examples/scheduler.py --model llama-3-8b --scale 1     # Llama-3-8B's shape, random weights, on a GPU
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import kvpolicy

PROMPTS, ANSWERS = (1024, 32768), (32, 512)  # shortest and longest, in tokens


@dataclass
class Request:
    """arrival, ended: seconds behind the beginning;  prompt: [1, n];  count: tokens wanted;  answer: tokens given"""

    arrival: float
    prompt: torch.Tensor
    count: int
    answer: list[int] = field(default_factory=list)
    ended: float = 0.0

    def __len__(self) -> int:
        return self.prompt.shape[1] + self.count

    def give(self, tokens: list[int], now: float) -> None:
        self.answer, self.ended = self.answer + tokens, now


def trace(model: Any, requests: int, rate: float, scale: int) -> list[Request]:
    """Arrivals at random, `rate` a second on average; lengths are log-uniform, and divided by `scale`."""
    draw = torch.Generator().manual_seed(0)

    def length(bounds: tuple[int, int]) -> int:
        share = float(torch.rand((), generator=draw))
        return max(1, round(bounds[0] * (bounds[1] / bounds[0]) ** share / scale))

    gaps = torch.empty(requests).exponential_(rate, generator=draw)
    wishes = [(arrival, length(PROMPTS), length(ANSWERS)) for arrival in gaps.cumsum(0).tolist()]
    ids = (torch.randint(3, model.config.vocab_size, (1, n), generator=draw) for _, n, _ in wishes)
    return [Request(arrival, each, count) for (arrival, _, count), each in zip(wishes, ids, strict=True)]


def clock() -> Callable[[], float]:
    """Seconds since it was made."""
    begun = time.perf_counter()
    return lambda: time.perf_counter() - begun


def in_slots(model: Any, requests: list[Request], memory: float, retention: float) -> float:
    """Each request joins as soon as there is a slot and room for what it keeps. Returns seconds."""
    spec, tokens = kvpolicy.ModelSpec.from_config(model.config), round(statistics.mean(map(len, requests)))
    size = spec.entry_bytes(model.dtype.itemsize) + 4  # and a position
    slots = max(1, int(memory // (spec.total_entries(retention, tokens) * size)))  # room for so many of mean length
    cache = kvpolicy.new_cache(model, retention=retention, allocator="uniform", policy="streaming", min_tokens=16)
    runner = kvpolicy.SlotRunner(model, cache, slots=slots, tokens=tokens)
    coming, asked, now = list(requests), dict[int, Request](), clock()
    while coming or runner.running or runner.waiting:
        while coming and coming[0].arrival <= now():
            request = coming.pop(0)
            asked[runner.admit(request.prompt, request.count)] = request
        for number, token in runner.step().items():
            asked[number].give([token], now())
        if coming and not (runner.running or runner.waiting):
            time.sleep(max(0.0, coming[0].arrival - now()))
    return now()


def in_batches(model: Any, requests: list[Request], memory: float) -> float:
    """What has come and fits beside each other is a batch, which ends with its longest answer. Returns seconds."""
    kvpolicy.detach(model)
    spec = kvpolicy.ModelSpec.from_config(model.config)
    each = spec.num_budgeted_layers * spec.num_kv_heads * spec.entry_bytes(model.dtype.itemsize)
    coming, now = list(requests), clock()
    while coming:
        time.sleep(max(0.0, coming[0].arrival - now()))
        batch = [coming.pop(0)]
        while coming and coming[0].arrival <= now() and columns([*batch, coming[0]]) * each <= memory:
            batch.append(coming.pop(0))
        longest, count = max(r.prompt.shape[1] for r in batch), max(r.count for r in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.int64)
        for row, request in zip(ids, batch, strict=True):
            row[longest - request.prompt.shape[1] :] = request.prompt[0]
        mask, length = (ids > 0).long().to(model.device), {"min_new_tokens": count, "max_new_tokens": count}
        out = model.generate(ids.to(model.device), attention_mask=mask, do_sample=False, **length)
        for request, row in zip(batch, out[:, longest:].tolist(), strict=True):
            request.give(row[: request.count], now())
    return now()


def columns(batch: list[Request]) -> int:
    """Entries of a KV head in a padded batch."""
    return len(batch) * (max(r.prompt.shape[1] for r in batch) + max(r.count for r in batch))


def load(name: str) -> Any:
    if name == "llama-3-8b":
        sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
        from shapes import long_llama

        return long_llama(32)
    if name != "tiny":
        return kvpolicy.load_model(name)[0]
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000}
    return LlamaForCausalLM(LlamaConfig(**heads, hidden_size=64, intermediate_size=128)).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="tiny, llama-3-8b, or what kvpolicy.load_model takes")
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--rate", type=float, default=100.0, help="requests a second")
    parser.add_argument("--scale", type=int, default=16, help="divides prompts of 1k to 32k and answers of 32 to 512")
    parser.add_argument("--full", type=float, default=2.0, help="memory, in full caches of the longest request")
    parser.add_argument("--retention", type=float, default=0.2)
    options = parser.parse_args()
    model = load(options.model)
    spec, most = kvpolicy.ModelSpec.from_config(model.config), (PROMPTS[1] + ANSWERS[1]) // options.scale
    memory = options.full * spec.total_entries(1.0, most) * spec.entry_bytes(model.dtype.itemsize)
    ways = {
        f"slots, {options.retention:.0%} kept": (in_slots, (options.retention,)),
        "static batches": (in_batches, ()),
    }
    for name, (serve, more) in ways.items():
        serve(model, trace(model, 2, 1e3, options.scale), memory, *more)  # loads what is loaded once
        requests = trace(model, options.requests, options.rate, options.scale)
        seconds, tokens = serve(model, requests, memory, *more), sum(len(request.answer) for request in requests)
        wait = statistics.median(request.ended - request.arrival for request in requests)
        print(f"{name}, {memory / 1e6:.1f} MB: {len(requests)} answers, {tokens} tokens in {seconds:.1f} s, "
              f"{tokens / seconds:.0f} tokens/s, an answer after {wait:.1f} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
