"""Never silently not applied: what is logged at start, and while requests are served."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from prometheus_client import REGISTRY
from prometheus_client.core import GaugeMetricFamily
from vllm.logger import init_logger

from kvpolicy_vllm.serving import Serving
from kvpolicy_vllm.steps import LayerTables

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
    if serving.window_block:
        kind += f", which with their padding are those of the {layers} layers without a sliding window"
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
    name, request = {"model_name": str(model.served_model_name)}, f"a request of {tokens} tokens"
    per_head = {"min": min(flat), "mean": sum(flat) / len(flat), "max": max(flat)}
    figures.publish(
        [
            ("bytes_per_token", f"Bytes of the cache a token, of {request}", name, room * entry / tokens),
            ("dense_bytes_per_token", "The same without a plan", name, dense * entry / tokens),
            (
                "concurrency_ratio",
                f"What {request} would take without a plan, over what it takes",
                name,
                dense / room,
            ),
            *(
                ("entries_per_head", "Entries of a KV head in a block", {**name, "statistic": statistic}, value)
                for statistic, value in per_head.items()
            ),
        ]
    )


class Figures:
    """For `/metrics`. vLLM takes metrics of its own name out when it starts; a collector of this kind stays."""

    def __init__(self) -> None:
        self._rows: list[tuple[str, str, dict[str, str], float]] = []

    def publish(self, rows: list[tuple[str, str, dict[str, str], float]]) -> None:
        """rows: name, help, labels and value; those of the engine that was started last"""
        if not self._rows:
            REGISTRY.register(self)
        self._rows = rows

    def collect(self) -> Iterator[Any]:
        metrics: dict[str, Any] = {}  # one of a name, as the format wants it
        for name, text, labels, value in self._rows:
            new = GaugeMetricFamily(f"vllm:kvpolicy_{name}", text, labels=list(labels))
            metrics.setdefault(name, new).add_metric(list(labels.values()), value)
        yield from metrics.values()


class Pulse:
    """Tokens that attended under the budget, told once in a while."""

    def __init__(self) -> None:
        self._told, self._steps, self._tokens = time.monotonic(), 0, 0

    def beat(self, step: Any, tables: LayerTables, entry_bytes: int) -> None:
        """step: vLLM's metadata, whose lengths are read only where a line is due;  entry_bytes: of a key and a value"""
        self._steps, self._tokens = self._steps + 1, self._tokens + step.num_actual_tokens
        now = time.monotonic()
        if now - self._told < INTERVAL:
            return
        counts = step.seq_lens[: step.num_reqs]
        tokens, requests = int(counts.sum()), int((counts > 0).sum())
        entries, per_head = tables.entries(counts), max(1, tables.num_heads * requests)
        logger.info(
            "kvpolicy: attended under the plan's budgets since the last such line: tokens %d, steps %d; requests in "
            "the last step: %d, of %d tokens with %.1f bytes each, dense %d; entries per KV head %.1f, dense %.1f",
            self._tokens, self._steps, requests, tokens, entries * entry_bytes / max(1, tokens),
            tables.num_heads * entry_bytes, entries / per_head, tokens * tables.num_heads / per_head,
        )  # fmt: skip
        self._told, self._steps, self._tokens = now, 0, 0


figures = Figures()
pulse = Pulse()
