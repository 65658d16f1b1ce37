"""Memory of a generation from the configuration alone, before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from kvpolicy.errors import BudgetError
from kvpolicy.plan_parts import positive
from kvpolicy.spec import LayerSpec, ModelSpec

POSITION_BYTES = 4  # int32 per entry
SEGMENT_BYTES = 16  # per sequence and KV head: start int64, length int32, capacity int32


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes for a whole batch at one context length, under a budget and under transformers' DynamicCache.

    entries:       entries kept, over all sequences, budgeted layers and KV heads
    kept_bytes:    their keys and values
    table_bytes:   the ragged cache's own: positions, and start, length and capacity of each segment
    other_bytes:   keys and values of sliding and chunked layers, which stay in stock caches. The constant state of
        linear layers is not counted; layers that share another's keys and values hold none
    dense_bytes:   keys and values of the budgeted layers if nothing is evicted
    layer_bytes:   those of one budgeted layer
    weights_bytes: the model's parameters, or None if not known
    """

    context_length: int
    retention: float
    batch_size: int
    entries: int
    kept_bytes: int
    table_bytes: int
    other_bytes: int
    dense_bytes: int
    layer_bytes: int
    weights_bytes: int | None = None

    @property
    def cache_bytes(self) -> int:
        """What the ragged cache and the stock caches beside it hold after the prompt."""
        return self.kept_bytes + self.table_bytes + self.other_bytes

    @property
    def dynamic_cache_bytes(self) -> int:
        """What transformers' DynamicCache holds for the same tokens."""
        return self.dense_bytes + self.other_bytes

    @property
    def prefill_peak_bytes(self) -> int:
        """The most that caches hold during prefill: all that is kept plus one full layer (its last is the peak)."""
        return self.cache_bytes + self.layer_bytes

    @property
    def total_bytes(self) -> int:
        """Weights, where known, and caches after the prompt."""
        return (self.weights_bytes or 0) + self.cache_bytes

    @property
    def dynamic_total_bytes(self) -> int:
        """Weights, where known, and DynamicCache."""
        return (self.weights_bytes or 0) + self.dynamic_cache_bytes

    @property
    def cache_ratio(self) -> float:
        """`cache_bytes` over `dynamic_cache_bytes`."""
        return self.cache_bytes / self.dynamic_cache_bytes

    def to_json(self) -> dict[str, int | float | None]:
        """Every field and every derived number under its name."""
        derived = (
            "cache_bytes",
            "dynamic_cache_bytes",
            "prefill_peak_bytes",
            "total_bytes",
            "dynamic_total_bytes",
            "cache_ratio",
        )
        return asdict(self) | {name: getattr(self, name) for name in derived}


def estimate_memory(
    spec: ModelSpec,
    context_length: int,
    retention: float,
    batch_size: int,
    itemsize: int,
    weights_bytes: int | None = None,
) -> MemoryEstimate:
    """Bytes that `batch_size` sequences of `context_length` tokens hold at a retention.

    itemsize: bytes of one number in the cache (2 for bfloat16)

    Activations are not counted, nor the floor under each KV head (sink tokens + 1), which matters for contexts of a
    few tokens only. Raises `BudgetError` for numbers out of range.
    """
    context_length = positive("context_length", context_length)
    batch_size, itemsize = positive("batch_size", batch_size), positive("itemsize", itemsize)
    if not (math.isfinite(retention) and 0 < retention <= 1):
        raise BudgetError(f"retention is {retention}, expected above 0 and at most 1 (0.3 keeps 30 %)")
    if weights_bytes is not None and weights_bytes < 0:
        raise BudgetError(f"weights_bytes is {weights_bytes}, expected at least 0")
    segments = batch_size * spec.num_budgeted_layers * spec.num_kv_heads
    entries = batch_size * spec.total_entries(retention, context_length)
    entry_bytes = spec.entry_bytes(itemsize)
    stock = sum(_stock_numbers(layer, context_length) for layer in spec.layers if not layer.is_budgeted)
    return MemoryEstimate(
        context_length=context_length,
        retention=retention,
        batch_size=batch_size,
        entries=entries,
        kept_bytes=entries * entry_bytes,
        table_bytes=entries * POSITION_BYTES + segments * SEGMENT_BYTES,
        other_bytes=batch_size * stock * itemsize,
        dense_bytes=segments * context_length * entry_bytes,
        layer_bytes=batch_size * spec.num_kv_heads * context_length * entry_bytes,
        weights_bytes=weights_bytes,
    )


def _stock_numbers(layer: LayerSpec, context_length: int) -> int:
    """Numbers that one sequence keeps in a layer without a budget."""
    if layer.kind == "linear" or layer.shared_with is not None:
        return 0
    tokens = min(context_length, layer.window or context_length)
    return tokens * layer.num_kv_heads * (layer.key_dim + layer.value_dim)
