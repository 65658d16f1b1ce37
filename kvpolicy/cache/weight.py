"""How many entries go into so many bytes, with everything that a cache holds besides them counted."""

from __future__ import annotations

import torch
from kvpolicy_kernels.formats import EntryFormat
from torch import Tensor

from kvpolicy.budget.entry_format import least_entries, name_of
from kvpolicy.cache.arena import LayerArena
from kvpolicy.cache.layer import StoreLayer
from kvpolicy.cache.select import Protection
from kvpolicy.cache.size import block_nbytes, entry_nbytes
from kvpolicy.errors import BudgetError
from kvpolicy.model.spec import ModelSpec
from kvpolicy.plugins.roles import EvictionPolicy

_STEP_NBYTES = 7 * torch.int64.itemsize + torch.float32.itemsize  # of a KV head, while a token is decoded: `LayerStep`


def table_nbytes(spec: ModelSpec, capacities: Tensor, batch_size: int = 1) -> int:
    """What a store holds that is no entry: the tables of its layers, each sequence's part of them the same, and the
    capacities, which sequences of one length share.
    """
    shape, count = spec.attention, spec.num_kv_heads
    arena = LayerArena(
        count, shape.key_dim, shape.value_dim, torch.float32, torch.device("cpu"), num_pinned=0, scored=False
    )
    empty = StoreLayer(0, arena, 1, count, Protection(), scores_stay=True)
    of_layer = sum(tensor.nbytes for tensor in empty.tensors.values())
    return batch_size * spec.num_budgeted_layers * of_layer + capacities.nbytes


def retention_within(
    memory: int | float,
    spec: ModelSpec,
    context: int,
    dtype: torch.dtype,
    policy: EvictionPolicy,
    entry_format: EntryFormat | None,
    *,
    scored: bool,
) -> float:
    """The largest part of `context` tokens whose entries, in a store of one sequence, take these bytes at most.

    memory: bytes, or as a float up to 1 the part of the full cache's bytes in `dtype`. Keys, values, positions, scores,
        tables and what stays exact are counted

    Raises `BudgetError` where not even the fewest entries of each KV head go into them.
    """
    full = spec.total_entries(1.0, context)
    allowed = round(memory * full * spec.entry_bytes(dtype.itemsize)) if isinstance(memory, float) else memory
    beside = table_nbytes(spec, torch.empty(spec.table_shape, dtype=torch.int64))
    flags = scored * spec.num_budgeted_layers * torch.bool.itemsize  # whether a score was NaN
    beside += block_nbytes(spec, dtype.itemsize, policy, entry_format) + flags
    beside += spec.total_entries(1.0, 1) * _STEP_NBYTES
    each = entry_nbytes(spec, dtype, scored=scored, entry_format=entry_format)
    least = min(least_entries(policy, entry_format), context) * spec.total_entries(1.0, 1)
    total = (allowed - beside) // each
    if total < least:
        raise BudgetError(
            f"memory={memory} is {allowed} bytes for {context} tokens, but the fewest entries that the KV heads can be "
            f"given in format={name_of(entry_format)} take {least * each + beside}: give more, or another format"
        )
    return min(total, full) / full
