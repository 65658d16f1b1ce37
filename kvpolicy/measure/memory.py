"""Memory of a generation from the configuration alone, before anything is loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from kvpolicy_kernels.formats import EntryFormat

from kvpolicy.budget.ask import Ask
from kvpolicy.budget.entry_format import check_format, least_entries
from kvpolicy.budget.plan import policy_of
from kvpolicy.budget.plan_parts import positive
from kvpolicy.cache.arena import LayerArena
from kvpolicy.cache.schedule import from_allocator
from kvpolicy.cache.select import MAX_TOKENS
from kvpolicy.cache.size import beside_nbytes, block_nbytes, holds_scores, vector_nbytes
from kvpolicy.cache.weight import table_nbytes
from kvpolicy.errors import BudgetError
from kvpolicy.model.layer_spec import LayerSpec
from kvpolicy.model.spec import ModelSpec
from kvpolicy.plugins.registry import registry
from kvpolicy.plugins.roles import EvictionPolicy


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes for a whole batch at one context length, under a budget and under transformers' DynamicCache.

    entries:       entries kept, over all sequences, budgeted layers and KV heads
    kept_bytes:    their keys and values
    table_bytes:   what the ragged cache holds besides: positions, scores where the policy has them, rows set aside for
        the next tokens, and its tables
    other_bytes:   keys and values of sliding and chunked layers, which stay in stock caches. The constant state of
        linear layers and a stock layer's own numbers are not counted; layers that share another's keys and values hold
        none
    dense_bytes:   keys and values of the budgeted layers if nothing is evicted
    layer_bytes:   those of one budgeted layer
    weights_bytes: the model's parameters, or None if not known
    activation_bytes: what one forward over the prompt holds at its largest besides weights and caches, 0 if not known
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
    activation_bytes: int = 0

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
    def peak_bytes(self) -> int:
        """The most that is held at once: weights, where known, caches in prefill, and activations."""
        return (self.weights_bytes or 0) + self.prefill_peak_bytes + self.activation_bytes

    @property
    def dynamic_peak_bytes(self) -> int:
        """The same with DynamicCache."""
        return (self.weights_bytes or 0) + self.dynamic_cache_bytes + self.activation_bytes

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
            "peak_bytes",
            "dynamic_peak_bytes",
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
    policy: str | EvictionPolicy | None = None,
    token_bytes: int = 0,
    entry_format: EntryFormat | None = None,
) -> MemoryEstimate:
    """Bytes that `batch_size` sequences of `context_length` tokens hold at a retention, in the cache that `new_cache`
    makes without a plan: an even split that grows with the tokens and keeps short prompts whole.

    itemsize: bytes of one number in the cache (2 for bfloat16)
    policy:   who evicts, a registered name or an object; default: "streaming". Most hold a score beside each entry
    token_bytes: activations of one token of a prompt that is fed in one forward
    entry_format: of the entries; None for numbers of `itemsize`. What stays exact counts among the tables

    Raises `BudgetError` for numbers out of range, `PluginError` for a policy that is none.
    """
    context_length = positive("context_length", context_length)
    if context_length > MAX_TOKENS:
        raise BudgetError(f"context_length is {context_length}, but a sequence can have {MAX_TOKENS} tokens at most")
    batch_size, itemsize = positive("batch_size", batch_size), positive("itemsize", itemsize)
    if weights_bytes is not None and weights_bytes < 0:
        raise BudgetError(f"weights_bytes is {weights_bytes}, expected at least 0")
    segments = batch_size * spec.num_budgeted_layers * spec.num_kv_heads
    entry_bytes, evicting = spec.entry_bytes(itemsize), policy_of(None, policy)
    check_format(entry_format, spec)
    own_bytes, least = vector_nbytes(spec, itemsize, entry_format), least_entries(evicting, entry_format)
    schedule = from_allocator(registry.create("allocator", "uniform"), evicting, spec, Ask(retention), least=least)
    capacities = schedule.at(context_length, None)
    lengths = capacities.clamp(max=context_length)
    entries, rows = (batch_size * int(x.sum()) for x in (lengths, LayerArena.room(lengths, capacities)))
    scored = schedule.evicts and holds_scores(evicting, None)
    beside = beside_nbytes(scored=scored)
    tables = rows * beside + (rows - entries) * own_bytes + table_nbytes(spec, capacities, batch_size)
    stock = sum(_stock_numbers(layer, context_length) for layer in spec.layers if not layer.is_budgeted)
    return MemoryEstimate(
        context_length=context_length,
        retention=retention,
        batch_size=batch_size,
        entries=entries,
        kept_bytes=entries * own_bytes,
        table_bytes=tables + batch_size * block_nbytes(spec, itemsize, evicting, entry_format),
        other_bytes=batch_size * stock * itemsize,
        dense_bytes=segments * context_length * entry_bytes,
        layer_bytes=batch_size * spec.num_kv_heads * context_length * entry_bytes,
        weights_bytes=weights_bytes,
        activation_bytes=batch_size * context_length * token_bytes,
    )


def _stock_numbers(layer: LayerSpec, context_length: int) -> int:
    """Numbers that one sequence keeps in a layer without a budget. One with a window keeps what the next token sees
    besides itself.
    """
    if layer.kind == "linear" or layer.shared_with is not None:
        return 0
    tokens = context_length if layer.window is None else min(context_length, layer.window - 1)
    return tokens * layer.num_kv_heads * (layer.key_dim + layer.value_dim)
