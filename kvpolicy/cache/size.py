"""What one entry of a store takes."""

from __future__ import annotations

import torch
from kvpolicy_kernels.formats import EntryFormat
from torch import Tensor

from kvpolicy.budget.entry_format import Format, exact_tokens, of_layer
from kvpolicy.model.spec import ModelSpec
from kvpolicy.plugins.roles import EvictionPolicy


def holds_scores(policy: EvictionPolicy, split: object | None) -> bool:
    """Whether each entry has a score beside it: not under a window rule, unless its budget is split at run time.

    split: what splits, None for nothing
    """
    return not policy.window_rule or split is not None


def entry_nbytes(spec: ModelSpec, dtype: torch.dtype, *, scored: bool, entry_format: EntryFormat | None = None) -> int:
    """Bytes of one entry: key, value and position, and its score where there is one. dtype: of keys and values."""
    return vector_nbytes(spec, dtype.itemsize, entry_format) + beside_nbytes(scored=scored)


def entry_costs(spec: ModelSpec, dtype: torch.dtype, *, scored: bool, entry_format: Format) -> Tensor:
    """Bytes of one entry of each KV head, int64 `[L, H]`: `Budget.cost` for a total in bytes."""
    layers = range(spec.num_budgeted_layers)
    own = [entry_nbytes(spec, dtype, scored=scored, entry_format=of_layer(entry_format, layer)) for layer in layers]
    return torch.tensor(own)[:, None].repeat(1, spec.num_kv_heads)


def vector_nbytes(spec: ModelSpec, itemsize: int, entry_format: EntryFormat | None) -> int:
    """Bytes of the key and the value of one entry, steps and zeros of codes included.

    itemsize: of the model's numbers
    """
    shape = spec.attention
    if entry_format is None:
        return spec.entry_bytes(itemsize)
    if entry_format.bits == 16:
        return (entry_format.key_dim(shape.key_dim) + shape.value_dim) * itemsize
    return entry_format.row_bytes(shape.key_dim) + entry_format.row_bytes(shape.value_dim)


def block_nbytes(spec: ModelSpec, itemsize: int, policy: EvictionPolicy, entry_format: Format) -> int:
    """Bytes of what stays exact of one sequence, over all layers and KV heads. itemsize: of one of its numbers"""
    heads, total = spec.num_kv_heads, 0
    for layer in range(spec.num_budgeted_layers):
        own = of_layer(entry_format, layer)
        slots, copied = exact_tokens(policy, own), spec.entry_bytes(itemsize)
        if own is not None and own.bits == 16:  # copies of keys alone, and which channels the others have
            copied = spec.attention.key_dim * itemsize
            total += heads * own.key_dim(spec.attention.key_dim)
        total += slots * (heads * copied + torch.int32.itemsize)
    return total


def beside_nbytes(*, scored: bool) -> int:
    """Bytes of one entry beside its key and value: its position, and its score where there is one."""
    return torch.int32.itemsize + (torch.float32.itemsize if scored else 0)
