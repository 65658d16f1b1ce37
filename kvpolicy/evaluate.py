"""Quality under a table of capacities, at bytes measured on a cache that was really filled."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kvpolicy.cache import RaggedStore
from kvpolicy.errors import BudgetError
from kvpolicy.integrations.transformers import TransformersProbe
from kvpolicy.interfaces import LayerActivations


@dataclass(frozen=True, slots=True)
class CacheBytes:
    """Measured on one sequence: bytes the cache holds, what a full cache would, and entries kept."""

    bytes: int
    dense_bytes: int
    entries: int


def perplexity(losses: Tensor) -> float:
    """Exp of the mean loss; losses: nats per token, `[n]`, sequences of equal length."""
    return math.exp(float(losses.double().mean()))


def measured_bytes(probe: TransformersProbe, capacities: Tensor) -> CacheBytes:
    """Fills one real cache with the probe's first sequence under `capacities` (int `[L, H]`) and weighs it.

    Raises `BudgetError` if the cache does not hold exactly what the table allows.
    """
    spec, length = probe.spec, probe.context_length
    dtype = next(probe.model.parameters()).dtype
    limits = capacities.clamp(max=length)
    store = RaggedStore(spec, limits, num_sink_tokens=probe.num_sink_tokens, dtype=dtype, device=probe.model.device)

    def fill(activations: LayerActivations) -> None:
        assert activations.keys is not None and activations.values is not None  # requested below
        store.fill(activations.layer, activations.keys, activations.values)

    single = TransformersProbe(probe.model, probe.sequences[:1], [probe.sequences[0]])
    single.observe(fill, frozenset({"keys", "values"}))
    if not torch.equal(store.lengths, limits):
        raise BudgetError(f"the cache holds {int(store.lengths.sum())} entries, the table says {int(limits.sum())}")
    dense = spec.num_budgeted_layers * spec.num_kv_heads * length * spec.entry_bytes(dtype.itemsize)
    return CacheBytes(bytes=store.nbytes, dense_bytes=dense, entries=int(store.lengths.sum()))
