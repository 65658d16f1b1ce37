"""Never silently not applied: what is logged at start, and while requests are served."""

from __future__ import annotations

import time
from typing import Any

from vllm.logger import init_logger

from kvpolicy_vllm.serving import Serving

INTERVAL = 60.0  # seconds

logger = init_logger("vllm.kvpolicy")


def start(serving: Serving, vllm_config: Any) -> None:
    """Bytes, entries and concurrency, against the cache that vLLM would have without a plan."""
    model = vllm_config.model_config
    tokens, layers, heads = serving.max_model_len, len(serving.slots), len(serving.slots[0])
    entry = 2 * model.get_head_size() * model.dtype.itemsize
    room = serving.entries(tokens, vllm_config.parallel_config.tensor_parallel_size)
    dense = tokens * layers * heads
    flat = [slots for row in serving.slots for slots in row]
    kind = "a slab" if serving.is_slab else f"blocks of {serving.tokens_per_block} tokens"
    if serving.period:
        kind += f", chosen by {serving.policy} every {serving.period} tokens"
    logger.info(
        "kvpolicy: %s gives each KV head %d to %d entries (mean %.1f) in %s, after %d sink tokens; prefix caching is "
        "off, and prompts attend under the window too",
        serving.plan, min(flat), max(flat), sum(flat) / len(flat), kind, serving.num_sink_tokens,
    )  # fmt: skip
    logger.info(
        "kvpolicy: %.1f bytes a token at %d tokens, dense %.1f; a request takes %.2f MB, dense %.2f MB: %.2f times the "
        "concurrency",
        room * entry / tokens, tokens, dense * entry / tokens, room * entry / 1e6, dense * entry / 1e6, dense / room,
    )  # fmt: skip


class Pulse:
    """Tokens that attended under the budget, told once in a while."""

    def __init__(self) -> None:
        self._told, self._steps, self._tokens = time.monotonic(), 0, 0

    def beat(self, num_requests: int, num_tokens: int) -> None:
        self._steps, self._tokens = self._steps + 1, self._tokens + num_tokens
        now = time.monotonic()
        if now - self._told >= INTERVAL:
            logger.info(
                "kvpolicy: attended under the plan's budgets since the last such line: tokens %d, steps %d; requests "
                "in the last step: %d",
                self._tokens, self._steps, num_requests,
            )  # fmt: skip
            self._told, self._steps, self._tokens = now, 0, 0


pulse = Pulse()
