"""What a user feels: a whole model of Llama-3-8B's shape decoding, as transformers does it and as kvpolicy does.

    python benchmarks/decode_graph.py --out benchmarks/results/decode_graph_h200

Random bf16 weights, prompts of random tokens, ragged plans (shares lognormal with sigma 1). One row for each cache,
policy, budget, context and share kept: seconds to the first token, milliseconds a token, peak memory; and the floor,
which is bytes (weights and kept entries) over the read limit of the device, measured in the same run. "kvpolicy" is a
loop over the model, nothing asked for: replays of a CUDA graph. "kvpolicy, compiled" is `DecodeRunner` with
`compiled=True`. Budgets grow with the tokens seen, as without `context_length=`, or are fixed. "in chunks" rows read
the prompt in pieces. `ready_s` is what the first four tokens of a new cache take, until the next ones are replays:
kernels are loaded, the model is compiled if it is to be, and a step is recorded. `turn_s` is what a second turn of 2048
tokens takes behind the decoded ones, the second such turn of the row. Then the largest batches that fit:
dense caches filled with random entries, and a `SlotRunner` whose slots all hold what was kept of one prompt.
"""

from __future__ import annotations

import gc
import itertools
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from shapes import described, long_llama
from shared import command_line, table_of, timed, versions, write_csv
from transformers import DynamicCache, StaticCache

import kvpolicy
from kvpolicy import BudgetPlan, ModelSpec
from kvpolicy.integrations.transformers import with_cache

from harness import machine, read_limit  # isort: skip  # where `shared` has shown it

PART, BATCH_PART = 0.3, 0.2
POLICIES = ("streaming", "snapkv", "h2o", "tova", "kv_compress")
BASE_CONTEXT = 128
ROOM = 256  # tokens behind the prompt
CHUNK, TURN = 4096, 2048
BATCH_CONTEXT = 32768
SPARE_BYTES = 8e9  # left to the allocator and to activations where a batch is chosen


def plan_of(model: Any, kept: float, context: int) -> BudgetPlan:
    """`kept` of the context, by shares that are lognormal with sigma 1; all heads alike where everything is kept."""
    spec = ModelSpec.from_config(model.config)
    return BudgetPlan.from_capacities(spec, table_of(spec, kept, context), context_length=context)


def cache_of(model: Any, kept: float, context: int, policy: str, *, grows: bool) -> Any:
    """An empty cache. grows: whether its budget is a part of the tokens seen instead of those of the context."""
    if kept == 1.0:
        return kvpolicy.new_cache(model, retention=1.0, policy=policy)
    fixed = None if grows else context
    return kvpolicy.new_cache(model, plan_of(model, kept, context), policy=policy, context_length=fixed)


def token_ms(step: Callable[[], object], count: int, warm: int = 3) -> float:
    """Median milliseconds of a step, by events around each."""
    for _ in range(warm):
        step()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks))


def clean() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


class Bench:
    """The rows, and what all of them share."""

    def __init__(self, model: Any, out: str, tokens: int, called: str) -> None:
        self.model, self.out, self.tokens, self.called = model, out, tokens, called
        self.limit = read_limit()
        self.weights = sum(parameter.nbytes for parameter in model.parameters())
        embedding = model.get_input_embeddings().weight.nbytes  # one row of it is read
        self.read_weights = self.weights - embedding
        self.rows: list[dict[str, Any]] = []
        self.warm: set[int] = set()  # contexts at which a prompt has run: cuDNN's attention plans at the first one
        print(f"read limit {self.limit / 1e12:.2f} TB/s, weights {self.weights / 1e9:.2f} GB", flush=True)

    def add(self, cache: str, context: int, batch: int, kept: float, ms: float, kv_bytes: int, **more: Any) -> None:
        floor = (self.read_weights + kv_bytes) / self.limit * 1e3
        row = {
            "cache": cache, "policy": "", "budget": "", "context": context, "batch": batch, "kept": kept,
            "ms_per_token": round(ms, 3),
            "tokens_per_second": round(batch / ms * 1e3, 1), "floor_ms": round(floor, 3),
            "share_of_floor": round(floor / ms, 3), "kv_gigabytes": round(kv_bytes / 1e9, 3),
            "ttft_s": "", "ready_s": "", "turn_s": "", "peak_gigabytes": "", "over_weights_gigabytes": "", **more,
            "model": self.called,
            "weights_gigabytes": round(self.weights / 1e9, 2),
            "read_limit_gigabytes_per_second": round(self.limit / 1e9), "n": self.tokens, "seed": 0,
            **versions("transformers", "kvpolicy"), **machine(),
        }  # fmt: skip
        self.rows.append(row)
        print(*list(row.values())[:17], sep="\t", flush=True)
        write_csv(f"{self.out}.csv", self.rows)

    def prompt(self, context: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(context)
        return torch.randint(0, self.model.config.vocab_size, (1, context), generator=generator).cuda()

    @torch.no_grad()
    def ours(
        self,
        context: int,
        kept: float,
        policy: str = "streaming",
        *,
        compiled: bool = False,
        grows: bool = True,
        chunk: int | None = None,
    ) -> None:
        """A prompt and tokens. The first prompt of a length, and compilation, are left out of the times."""
        clean()
        cache = cache_of(self.model, kept, context, policy, grows=grows)
        runner = kvpolicy.DecodeRunner(self.model, cache, compiled=compiled)
        prompt = self.prompt(context)
        warm = runner.prefill(prompt[:, : min(BASE_CONTEXT, context)]).argmax(-1)
        ready, _ = timed(lambda: [runner.step(warm) for _ in range(4)])
        assert runner.mode == "graph", runner.why
        if context not in self.warm:
            self.warm.add(context)
            runner.prefill(prompt)
        clean()
        cache.reset()
        ttft, logits = timed(lambda: runner.prefill(prompt) if compiled else self.read(cache, prompt, chunk))
        peak, token = torch.cuda.max_memory_allocated(), logits.argmax(-1, keepdim=True)
        arena = cache.nbytes
        loop = partial(self.model, token, **with_cache(self.model, cache), use_cache=True)
        ms = token_ms(partial(runner.step, token) if compiled else loop, self.tokens)
        assert runner.mode == "graph", runner.why
        kv_bytes = int(cache.lengths.sum()) * 2 * 128 * 2
        name = "kvpolicy, compiled" if compiled else "kvpolicy"
        turn = "" if compiled or chunk else self.turn(cache)
        self.add(
            name + (", in chunks" if chunk else ""), context, 1, kept, ms, kv_bytes, **memory(peak, self.weights),
            policy=policy, budget="growing" if grows else "fixed", ttft_s=round(ttft, 3), ready_s=round(ready, 3),
            turn_s=turn,
            arena_gigabytes=round(arena / 1e9, 3),
        )  # fmt: skip

    def read(self, cache: Any, prompt: torch.Tensor, chunk: int | None) -> torch.Tensor:
        """Reads a prompt, in chunks of so many tokens if one is given. Returns the logits of its last token."""
        for part in prompt.split(chunk or prompt.shape[1], 1):
            out = self.model(part, **with_cache(self.model, cache), use_cache=True, logits_to_keep=1)
        logits: torch.Tensor = out.logits[:, -1]
        return logits

    def turn(self, cache: Any) -> float:
        """Seconds of a turn's prompt behind what the cache has; the first such one is left out."""
        tokens = self.prompt(TURN)
        return round([timed(lambda: self.read(cache, tokens, None))[0] for _ in range(2)][1], 4)

    @torch.no_grad()
    def dynamic(self, context: int, name: str, cudnn: bool, chunk: int | None = None) -> None:
        """As transformers decodes by default. torch prefers cuDNN's attention, which plans again at every length."""
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        clean()
        kvpolicy.detach(self.model)
        cache, prompt = DynamicCache(config=self.model.config), self.prompt(context)
        ttft, logits = timed(lambda: self.read(cache, prompt, chunk))
        peak, token = torch.cuda.max_memory_allocated(), logits.argmax(-1, keepdim=True)
        ms = token_ms(lambda: self.model(token, **with_cache(self.model, cache)), min(self.tokens, 24))
        kv_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        name += ", in chunks" if chunk else ""
        turn = "" if chunk else self.turn(cache)
        kept = memory(peak, self.weights)
        self.add(name, context, 1, 1.0, ms, kv_bytes, **kept, ttft_s=round(ttft, 3), turn_s=turn)
        torch.backends.cuda.enable_cudnn_sdp(True)

    @torch.no_grad()
    def static(self, context: int) -> None:
        """As transformers makes it fast: a static cache, and the step compiled with CUDA graphs. Random entries: with a
        prompt of this length its mask over the whole cache would be the largest tensor of all.
        """
        clean()
        kvpolicy.detach(self.model)
        cache = StaticCache(config=self.model.config, max_cache_len=context + ROOM)
        cache.early_initialization(1, 8, 128, torch.bfloat16, self.model.device)
        for layer in cache.layers:
            layer.keys.normal_()
            layer.values.normal_()
            layer.cumulative_length.fill_(context)
        token = torch.ones(1, 1, dtype=torch.int64, device="cuda")
        step = torch.compile(self.model.forward, mode="reduce-overhead", fullgraph=True, dynamic=False)
        position = torch.full((1, 1), context, device="cuda")

        def one() -> None:
            torch.compiler.cudagraph_mark_step_begin()
            step(input_ids=token, position_ids=position, **with_cache(self.model, cache), use_cache=True)

        ms = token_ms(one, min(self.tokens, 24), warm=5)
        kv_bytes = context * self.model.config.num_hidden_layers * 8 * 2 * 128 * 2
        self.add("StaticCache, compiled", context, 1, 1.0, ms, kv_bytes)

    @torch.no_grad()
    def largest_ours(self) -> None:
        """The most sequences whose kept entries fit beside the weights."""
        clean()
        plan = plan_of(self.model, BATCH_PART, BATCH_CONTEXT)
        table = plan.capacities(BATCH_CONTEXT)
        free = torch.cuda.mem_get_info()[0] - SPARE_BYTES
        batch = int(free // (int(table.sum()) * (2 * 128 * 2 + 4)))
        cache = kvpolicy.new_cache(self.model, plan, context_length=BATCH_CONTEXT)
        self.read(cache, self.prompt(BATCH_CONTEXT), None)
        runner = kvpolicy.SlotRunner(
            self.model,
            kvpolicy.new_cache(self.model, plan, context_length=BATCH_CONTEXT),
            slots=batch,
            tokens=BATCH_CONTEXT,
        )
        for slot in range(batch):
            runner.store.seat(slot, table, cache.opened())
        token = torch.ones(batch, 1, dtype=torch.int64, device="cuda")
        step = partial(self.model, token, **with_cache(self.model, runner.cache), use_cache=True)
        ms = token_ms(step, 16)
        assert runner.cache.replays.mode == "graph", runner.cache.replays.why
        kv_bytes = int(runner.cache.lengths.sum()) * 2 * 128 * 2
        self.add("kvpolicy, slots", BATCH_CONTEXT, batch, BATCH_PART, ms, kv_bytes, policy="streaming", budget="fixed")

    @torch.no_grad()
    def largest_dense(self) -> None:
        """The most sequences whose full caches fit beside the weights, filled with random entries."""
        clean()
        kvpolicy.detach(self.model)
        layers = self.model.config.num_hidden_layers
        each = BATCH_CONTEXT * 8 * 2 * 128 * 2
        free = torch.cuda.mem_get_info()[0] - SPARE_BYTES
        batch = int(free // (each * (layers + 2)))  # a layer that grows exists twice
        cache = DynamicCache(config=self.model.config)
        shape = (batch, 8, BATCH_CONTEXT, 128)
        for layer in range(layers):
            cache.update(*(torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2)), layer)
        token = torch.ones(batch, 1, dtype=torch.int64, device="cuda")
        ms = token_ms(lambda: self.model(token, **with_cache(self.model, cache)), 5, warm=2)
        self.add("DynamicCache, eager", BATCH_CONTEXT, batch, 1.0, ms, batch * each * layers)


def memory(peak: int, weights: int) -> dict[str, float]:
    return {"peak_gigabytes": round(peak / 1e9, 2), "over_weights_gigabytes": round((peak - weights) / 1e9, 2)}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--out", required=True, help="beginning of the file's name: OUT.csv")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--contexts", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--policies", nargs="+", default=POLICIES)
    parser.add_argument("--skip-batches", action="store_true")
    parser.add_argument("--skip-compiled", action="store_true")
    parser.add_argument("--only-compiled", action="store_true")
    parser.add_argument("--short", action="store_true", help="only budgets that grow, and 30 %% kept")
    options = parser.parse_args()
    model = long_llama(options.layers)
    bench = Bench(model, options.out, options.tokens, described(model))
    for context in () if options.only_compiled else options.contexts:
        for policy in options.policies:
            bench.ours(context, PART, policy)
            if not options.short:
                bench.ours(context, PART, policy, grows=False)
        bench.dynamic(context, "DynamicCache, eager, flash", cudnn=False)
        bench.dynamic(context, "DynamicCache, eager, flash", cudnn=False, chunk=CHUNK)
        for policy in options.policies[:2]:
            bench.ours(context, PART, policy, chunk=CHUNK)
    if not options.skip_batches:
        bench.largest_ours()
        bench.largest_dense()
    if options.skip_compiled:
        return
    for context in options.contexts:
        for policy in options.policies:
            bench.ours(context, PART, policy, compiled=True)
        for kept in () if options.short else (1.0, 0.1):
            bench.ours(context, kept, compiled=True)
        if not options.short:
            bench.dynamic(context, "DynamicCache, eager", cudnn=True)
            bench.static(context)


if __name__ == "__main__":
    main()
