"""Quality under a table of capacities, at bytes measured on a cache that was really filled."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kvpolicy.cache import RaggedStore
from kvpolicy.cache.schedule import Fixed
from kvpolicy.cache.store import Scoring
from kvpolicy.errors import BudgetError
from kvpolicy.integrations.transformers import TransformersProbe
from kvpolicy.interfaces import LayerActivations
from kvpolicy.registry import registry


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
    spec, limits = probe.spec, capacities.clamp(max=probe.context_length)
    policy = registry.create("policy", "streaming", {"num_sink_tokens": probe.num_sink_tokens})
    store = RaggedStore(spec, Fixed(limits), policy)

    def fill(activations: LayerActivations) -> None:
        query, key, value = activations.queries, activations.keys, activations.values
        assert query is not None and key is not None and value is not None  # requested below
        store.keep(activations.layer, query, store.arrive(activations.layer, key, value), Scoring())

    single = TransformersProbe(probe.model, probe.sequences[:1], [probe.sequences[0]])
    single.observe(fill, frozenset({"queries", "keys", "values"}))
    held = store.lengths[:, 0]
    if not torch.equal(held, limits):
        raise BudgetError(f"the cache holds {int(held.sum())} entries, the table says {int(limits.sum())}")
    return CacheBytes(bytes=store.nbytes, dense_bytes=store.dense_nbytes, entries=int(held.sum()))
