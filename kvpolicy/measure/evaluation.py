"""Quality under a table of capacities, at bytes measured on a cache that was really filled."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvpolicy.budget.entry_format import Format
from kvpolicy.errors import BudgetError
from kvpolicy.integrations.transformers import PromptProbe, SequenceProbe, TransformersProbe
from kvpolicy.plugins.roles import EvictionPolicy
from kvpolicy.text.corpus import Tokenize


@dataclass(frozen=True, slots=True)
class CacheBytes:
    """Measured on one sequence: bytes the cache holds, what a full cache would, and entries kept."""

    bytes: int
    dense_bytes: int
    entries: int


def probe_for(
    policy: EvictionPolicy,
    model: Any,
    sequences: Tensor,
    prompts: Sequence[Tensor] = (),
    *,
    tokenize: Tokenize | None = None,
    tokenizer: Any = None,
    prefill_length: int | None = None,
    batch_size: int = 1,
    entry_format: Format = None,
    shared_layers: Mapping[int, int] | None = None,
) -> SequenceProbe:
    """The probe whose loss fits a policy: that of decoding from the first token on for a window rule, else the one
    behind a compressed prompt. Arguments as for the probes.

    prefill_length: None means 0 for a window rule, else half of a sequence
    """
    options: dict[str, Any] = {"tokenize": tokenize, "batch_size": batch_size, "entry_format": entry_format}
    options |= {"shared_layers": shared_layers}
    if not policy.window_rule:
        options |= {"policy": policy, "prefill_length": prefill_length, "tokenizer": tokenizer}
        return PromptProbe(model, sequences, prompts, **options)
    options |= {"num_sink_tokens": policy.num_sink_tokens, "prefill_length": prefill_length or 0}
    return TransformersProbe(model, sequences, prompts, **options)


def perplexity(losses: Tensor) -> float:
    """Exp of the mean loss; losses: nats per token, `[n]`, sequences of equal length."""
    return math.exp(float(losses.double().mean()))


def measured_bytes(probe: SequenceProbe, capacities: Tensor) -> CacheBytes:
    """Fills one real cache with the probe's first sequence, or its prompt, under `capacities` (int `[L, H]`) and weighs
    it.

    Raises `BudgetError` if the cache does not hold exactly what the table allows (its total, where an allocator splits
    at run time).
    """
    limits = capacities.clamp(max=probe.context_length)
    store = probe.filled(limits)
    lengths = store.lengths[:, 0]
    is_exact = probe.allocator is not None or torch.equal(lengths, limits)
    if int(lengths.sum()) != int(limits.sum()) or not is_exact:
        raise BudgetError(f"the cache holds {int(lengths.sum())} entries, the table says {int(limits.sum())}")
    all_layers = probe.spec.num_budgeted_layers + len(probe.shared_layers)
    dense = store.dense_nbytes // probe.spec.num_budgeted_layers * all_layers
    return CacheBytes(bytes=store.nbytes, dense_bytes=dense, entries=int(lengths.sum()))
