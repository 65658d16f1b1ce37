"""A model with sliding windows decoding: Gemma-3-4B's shape, as transformers makes it fast and as kvpolicy does it.

    python benchmarks/decode_windows.py --out benchmarks/results/decode_windows_h200

Random bf16 weights, a prompt of random tokens, a ragged plan for the layers that see everything (shares lognormal with
sigma 1); those with a window keep their window. The rows are those of `decode_graph.py`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from decode_graph import BASE_CONTEXT, PART, ROOM, Bench, cache_of, clean, memory, token_ms
from shapes import random_model
from shared import command_line, timed
from transformers import CompileConfig, DynamicCache, StaticCache

import kvpolicy
from kvpolicy.integrations.transformers import with_cache

SHAPE = "Gemma-3-4B"


def bytes_read(config: Any, entries: int) -> int:
    """Bytes of the keys and values that a token reads. entries: of one layer that sees everything."""
    windows = [min(entries, config.sliding_window) if x == "sliding_attention" else entries for x in config.layer_types]
    return int(sum(windows)) * config.num_key_value_heads * 2 * config.head_dim * 2


class Windows(Bench):
    """The rows of a model some of whose layers have a window."""

    @torch.no_grad()
    def windows(self, context: int, policy: str, *, compiled: bool) -> None:
        clean()
        cache = cache_of(self.model, PART, context, policy, grows=True)
        runner = kvpolicy.DecodeRunner(self.model, cache, compiled=compiled)
        prompt = self.prompt(context)
        warm = runner.prefill(prompt[:, :BASE_CONTEXT]).argmax(-1)
        ready, _ = timed(lambda: [runner.step(warm) for _ in range(4)])
        for _ in range(2):  # the first loads kernels
            clean()
            cache.reset()
            ttft, logits = timed(partial(runner.prefill, prompt))
        peak, token = torch.cuda.max_memory_allocated(), logits.argmax(-1, keepdim=True)
        loop = partial(self.model, token, **with_cache(self.model, cache), use_cache=True)
        ms = token_ms(partial(runner.step, token) if compiled else loop, self.tokens)
        assert runner.mode == "graph", runner.why
        name = "kvpolicy, compiled" if compiled else "kvpolicy"
        self.add(
            name, context, 1, PART, ms, cache.nbytes, **memory(peak, self.weights), policy=policy, budget="growing",
            ttft_s=round(ttft, 3), ready_s=round(ready, 3),
        )  # fmt: skip

    @torch.no_grad()
    def dynamic(self, context: int) -> None:
        """The default of transformers."""
        clean()
        kvpolicy.detach(self.model)
        cache, prompt = DynamicCache(config=self.model.config), self.prompt(context)
        ttft, logits = timed(partial(self.read, cache, prompt, None))
        peak, token = torch.cuda.max_memory_allocated(), logits.argmax(-1, keepdim=True)
        step = partial(self.model, token, **with_cache(self.model, cache), use_cache=True)
        ms = token_ms(step, min(self.tokens, 24), warm=5)
        entries, kept = bytes_read(self.model.config, context), memory(peak, self.weights)
        self.add("DynamicCache, eager", context, 1, 1.0, ms, entries, **kept, ttft_s=round(ttft, 3))

    @torch.no_grad()
    def static(self, context: int) -> None:
        """As transformers makes it fast: a static cache, and the step compiled as `generate` does. Random entries: with
        a prompt of this length its mask over the whole cache would be the largest tensor of all.
        """
        clean()
        kvpolicy.detach(self.model)
        config, device = self.model.config, self.model.device
        cache = StaticCache(config=config, max_cache_len=context + ROOM)
        cache.early_initialization(1, config.num_key_value_heads, config.head_dim, self.model.dtype, device)
        for layer in cache.layers:
            layer.keys.normal_()
            layer.values.normal_()
            layer.cumulative_length.fill_(context)
            if layer.is_sliding:
                layer.cumulative_length_int = context
        token, position = torch.ones(1, 1, dtype=torch.int64, device=device), torch.full((1, 1), context, device=device)
        compilation = CompileConfig()
        # a window's length is a number in Python: told to be one shape only, it would be compiled again at each token
        step = torch.compile(self.model.forward, mode=compilation.mode, dynamic=compilation.dynamic)

        def one() -> None:
            torch.compiler.cudagraph_mark_step_begin()
            step(input_ids=token, position_ids=position, **with_cache(self.model, cache), use_cache=True)

        ms = token_ms(one, min(self.tokens, 24), warm=5)
        self.add("StaticCache, compiled", context, 1, 1.0, ms, bytes_read(config, context))


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--out", required=True, help="beginning of the file's name: OUT.csv")
    parser.add_argument("--contexts", type=int, nargs="+", default=[32768])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--only-static", action="store_true", help="only transformers' compiled static cache")
    options = parser.parse_args()
    bench = Windows(random_model(SHAPE), options.out, options.tokens, f"{SHAPE} shape, random")
    for context in options.contexts:
        if not options.only_static:
            for policy in ("streaming", "snapkv"):
                bench.windows(context, policy, compiled=False)
            bench.dynamic(context)
            bench.windows(context, "streaming", compiled=True)
        bench.static(context)


if __name__ == "__main__":
    main()
