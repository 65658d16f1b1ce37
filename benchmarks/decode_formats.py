"""A model of Llama-3-8B's shape decoding over entries of 16, 8 and 4 bits: what a token takes, and how many fit.

    python benchmarks/decode_formats.py --out benchmarks/results/decode_formats_h200

Random bf16 weights, prompts of random tokens, the policy `streaming`. One row for each format at the whole context of
131072 tokens, through `DecodeRunner`, plain and compiled; the goal is 6.3 ms in int4, where bf16 takes 8.77. Then the
largest batch of contexts of 32768 of which 20 % are kept: a `SlotRunner` whose slots all hold what was kept of one
prompt, as many as memory allows; the goal is 3 times as many sequences in int4 as in bf16. Bytes are those of what a
token reads.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from decode_graph import BASE_CONTEXT, BATCH_CONTEXT, BATCH_PART, SPARE_BYTES, Bench, clean, memory, plan_of, token_ms
from shapes import described, long_llama
from shared import command_line, timed

import kvpolicy
from kvpolicy import ModelSpec
from kvpolicy.budget.entry_format import MODEL, format_of, name_of
from kvpolicy.cache.size import block_nbytes, entry_nbytes
from kvpolicy.integrations.transformers import with_cache


class Formats(Bench):
    """The rows of formats."""

    def kv_bytes(self, entries: int, name: str) -> int:
        spec, own = ModelSpec.from_config(self.model.config), format_of(given(name))
        return entries * entry_nbytes(spec, torch.bfloat16, scored=False, entry_format=own)

    @torch.no_grad()
    def whole(self, context: int, name: str, *, compiled: bool) -> None:
        """Everything kept."""
        clean()
        cache = kvpolicy.new_cache(self.model, retention=1.0, policy="streaming", format=given(name))
        runner = kvpolicy.DecodeRunner(self.model, cache, compiled=compiled)
        prompt = self.prompt(context)
        warm = runner.prefill(prompt[:, : min(BASE_CONTEXT, context)]).argmax(-1)
        ready, _ = timed(lambda: [runner.step(warm) for _ in range(4)])
        assert runner.mode == "graph", runner.why
        clean()
        cache.reset()
        ttft, logits = timed(partial(runner.prefill, prompt))
        peak, token = torch.cuda.max_memory_allocated(), logits.argmax(-1, keepdim=True)
        ms = token_ms(partial(runner.step, token), self.tokens)
        assert runner.mode == "graph", runner.why
        self.add(
            "kvpolicy, compiled" if compiled else "kvpolicy", context, 1, 1.0, ms,
            self.kv_bytes(int(cache.lengths.sum()), name), **memory(peak, self.weights),
            policy="streaming", budget="whole", ttft_s=round(ttft, 3), ready_s=round(ready, 3),
            arena_gigabytes=round(cache.nbytes / 1e9, 3), format=name,
        )  # fmt: skip

    @torch.no_grad()
    def batch(self, context: int, name: str, most: int | None) -> None:
        """The most sequences that fit beside the weights; at most so many, if a number is given."""
        clean()
        plan = plan_of(self.model, BATCH_PART, context)
        empty = partial(kvpolicy.new_cache, self.model, plan, context_length=context, format=given(name))
        cache = empty()
        self.read(cache, self.prompt(context), None)
        clean()
        table = cache.capacities[:, 0]
        count = int((torch.cuda.mem_get_info()[0] - SPARE_BYTES) // self.slot_bytes(table, cache))
        count = count if most is None else min(count, most)
        runner = kvpolicy.SlotRunner(self.model, empty(), slots=count, tokens=context)
        for slot in range(count):
            runner.store.seat(slot, table, cache.opened())
        token = torch.ones(count, 1, dtype=torch.int64, device=self.model.device)
        step = partial(self.model, token, **with_cache(self.model, runner.cache), use_cache=True)
        ms = token_ms(step, 16)
        assert runner.cache.replays.mode == "graph", runner.cache.replays.why
        kv_bytes = self.kv_bytes(int(runner.cache.lengths.sum()), name)
        self.add(
            "kvpolicy, slots", context, count, BATCH_PART, ms, kv_bytes, policy="streaming", budget="fixed",
            arena_gigabytes=round(runner.cache.nbytes / 1e9, 3), format=name,
        )  # fmt: skip

    def slot_bytes(self, table: torch.Tensor, cache: Any) -> int:
        """Of a sequence under these capacities."""
        spec, recipe = ModelSpec.from_config(self.model.config), cache.recipe
        block = block_nbytes(spec, torch.bfloat16.itemsize, recipe.policy, recipe.entry_format)
        return block + self.kv_bytes(int(table.sum()), name_of(recipe.entry_format))


def given(name: str) -> str | None:
    return None if name == MODEL else name


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--out", required=True, help="beginning of the file's name: OUT.csv")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--context", type=int, default=131072, help="of the rows that keep everything")
    parser.add_argument("--batch-context", type=int, default=BATCH_CONTEXT)
    parser.add_argument("--most", type=int, help="sequences of a batch, at most")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--formats", nargs="+", default=["int4", MODEL, "int8"])
    parser.add_argument("--skip-compiled", action="store_true")
    options = parser.parse_args()
    model = long_llama(options.layers)
    bench: Any = Formats(model, options.out, options.tokens, described(model))
    for place, name in enumerate(options.formats):
        bench.whole(options.context, name, compiled=False)
        if place < 2:
            bench.batch(options.batch_context, name, options.most)
    for name in () if options.skip_compiled else options.formats:
        bench.whole(options.context, name, compiled=True)


if __name__ == "__main__":
    main()
