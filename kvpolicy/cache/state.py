"""What a store holds, as tensors and plain values, and the store from them again.

Of an arena the entries alone are taken along, by position, with their scores: nothing says how they lay in memory. They
get room again as behind a prompt, and the order in which they will leave follows from their scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields as parts_of
from typing import Any

import torch
from kvpolicy_kernels.key_centre import KeyCentre
from torch import Tensor

from kvpolicy.budget.entry_format import of_layer
from kvpolicy.cache.chunk import Chunk
from kvpolicy.cache.layer import StoreLayer
from kvpolicy.cache.schedule import UNLIMITED
from kvpolicy.cache.select import MAX_TOKENS
from kvpolicy.cache.store import RaggedStore
from kvpolicy.errors import KVPolicyError
from kvpolicy.files.fields import Fields, describe, sequence, whole

_COUNTS = ("seen", "evicted_at", "table")
_CHUNK = ("key", "value", "positions")


class Tensors:
    """Tensors of a file, by name. Each is taken once, with the dtype and the shape that it must have."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._left = dict(tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def take(self, name: str, dtype: torch.dtype | None = None, shape: Sequence[int | None] | None = None) -> Tensor:
        """shape: with None for a size that may be any. Raises `KVPolicyError` for another tensor than expected."""
        if name not in self._left:
            raise KVPolicyError(f"the tensor '{name}' is missing")
        tensor = self._left.pop(name)
        fits = shape is None or (
            tensor.dim() == len(shape) and all(b in (None, a) for a, b in zip(tensor.shape, shape, strict=True))
        )
        if not fits or dtype not in (None, tensor.dtype):
            sizes = "any shape" if shape is None else f"[{', '.join('n' if x is None else str(x) for x in shape)}]"
            raise KVPolicyError(
                f"the tensor '{name}' is {tensor.dtype} {list(tensor.shape)}, expected {dtype or tensor.dtype} {sizes}"
            )
        return tensor

    def done(self) -> None:
        """Raises `KVPolicyError` if a tensor is left."""
        if self._left:
            raise KVPolicyError(f"the tensor '{min(self._left)}' belongs to nothing")


def pack(store: RaggedStore) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors on the CPU, by name, and JSON values. The store must not be in the middle of a forward."""
    tensors: dict[str, Tensor] = {}
    layers = []
    for index, layer in enumerate(store.layers):
        layers.append(None if layer is None else {"decoded": layer.decoded})
        if layer is not None:
            layer.check_settled()
            tensors |= {f"layers.{index}.{name}": tensor.cpu() for name, tensor in _packed(layer).items()}
    tables = {id(table): table for table in store.rows.tables if table is not None}
    if tables:
        tensors["rows"] = torch.stack(list(tables.values()))
    order = list(tables)
    rows = [None if table is None else order.index(id(table)) for table in store.rows.tables]
    meta = {"heads": [store.first_head, store.num_heads], "rows": rows, "seen": list(store.rows.seen), "layers": layers}
    return tensors, meta


def unpack(
    store: RaggedStore, tensors: Tensors, fields: Fields, dtype: torch.dtype, devices: Sequence[torch.device]
) -> None:
    """Fills an empty store of the same batch and heads. dtype, devices [L]: of keys and values.

    Raises `KVPolicyError` or `PlanError` for values that no store can have had.
    """
    _fill_rows(store, tensors, fields)
    layers = fields.read("layers", sequence, len(store.layers))
    for index, (value, device) in enumerate(zip(layers, devices, strict=True)):
        if value is None:
            continue
        own, prefix = Fields(value, fields.path(f"layers[{index}]")), f"layers.{index}"
        store.set_key_centre(index, _read_centre(store, index, tensors, prefix))
        _fill(store, store.open(index, dtype, device), tensors, own, prefix)
    counts = [layer.seen for layer in store.layers if layer is not None]
    if any(not torch.equal(counts[0], count) for count in counts[1:]):
        raise KVPolicyError("its layers have seen different numbers of tokens")


def batch_size(fields: Fields) -> int:
    """Sequences of a packed store."""
    rows = fields.read("rows", sequence)
    if not rows:
        raise KVPolicyError("it holds no sequence")
    return len(rows)


def heads(fields: Fields) -> tuple[int, int]:
    """(first, count) of the KV heads of a packed store."""
    first, count = fields.read("heads", sequence, 2)
    return whole(first, fields.path("heads[0]"), 0), whole(count, fields.path("heads[1]"), 1)


def flag(value: object, path: str) -> bool:
    """True or false; a reader for `Fields`."""
    if not isinstance(value, bool):
        raise KVPolicyError(f"{path} is {describe(value)}, expected true or false")
    return value


def _packed(layer: StoreLayer) -> dict[str, Tensor]:
    arena = layer.arena
    rows = arena.padded_rows().gather(1, arena.padded_positions().argsort(1))
    rows = rows[rows >= 0]
    packed = {name: tensor[rows] for name, tensor in arena.entries.items()} | arena.beside
    if (centre := arena.key_centre) is not None:  # whoever reads the file may know another one
        packed |= {f"key_centre.{part.name}": getattr(centre, part.name) for part in parts_of(centre)}
    packed |= {"length": arena.length} | {name: getattr(layer, name) for name in _COUNTS}
    if not all(bool(torch.isfinite(packed[name]).all()) for name in arena.columns):
        raise KVPolicyError("it holds keys or values that are not finite")
    if (pending := layer.pending) is not None:
        packed |= {f"pending.{name}": getattr(pending, name) for name in _CHUNK}
    return packed


def _read_centre(store: RaggedStore, layer: int, tensors: Tensors, prefix: str) -> KeyCentre | None:
    """What the keys of a layer were encoded less of."""
    own, prefix = of_layer(store.entry_format, layer), f"{prefix}.key_centre"
    if own is None or not own.centred:
        return None
    if f"{prefix}.coefficients" not in tensors:
        if store.key_centres[layer] is not None:
            raise KVPolicyError(
                f"'{prefix}' is missing, as in files of before centres were kept in them: read the text again into a "
                "new cache and save that"
            )
        return None
    heads, dim = store.num_heads, store.spec.attention.key_dim
    coefficients = tensors.take(f"{prefix}.coefficients", torch.float32, (None, heads, dim))
    frequencies = tensors.take(f"{prefix}.frequencies", torch.int32, (heads, (len(coefficients) - 1) // 2))
    if not bool(torch.isfinite(coefficients).all()):
        raise KVPolicyError(f"'{prefix}.coefficients' holds numbers that are not finite")
    try:
        return KeyCentre(coefficients.clone(), frequencies.clone())
    except ValueError as error:
        raise KVPolicyError(f"'{prefix}' does not fit: {error}") from None


def _fill_rows(store: RaggedStore, tensors: Tensors, fields: Fields) -> None:
    layers, all_heads = store.spec.table_shape
    tables: list[Tensor] = []
    if "rows" in tensors:
        stacked = tensors.take("rows", torch.int64, (None, layers, all_heads))
        _check(stacked, 0, UNLIMITED, "rows")
        tables = list(stacked.clone())
    rows, seen = (fields.read(name, sequence, store.batch_size) for name in ("rows", "seen"))
    for row, (which, count) in enumerate(zip(rows, seen, strict=True)):
        if which is not None and whole(which, fields.path(f"rows[{row}]"), 0) >= len(tables):
            raise KVPolicyError(f"sequence {row} has table {which}, but there are {len(tables)}")
        store.rows.tables[row] = None if which is None else tables[which]
        store.rows.seen[row] = whole(count, fields.path(f"seen[{row}]"), 0)


def _fill(store: RaggedStore, layer: StoreLayer, tensors: Tensors, fields: Fields, prefix: str) -> None:
    arena, dtype, shape = layer.arena, layer.arena.like.dtype, store.spec.attention
    batch, num_heads = store.batch_size, store.num_heads
    counts, pending = {}, None
    for name in _COUNTS:
        sizes = (batch, num_heads) if name == "table" else (batch,)
        counts[name] = tensors.take(f"{prefix}.{name}", torch.int64, sizes).clone()
    length = tensors.take(f"{prefix}.length", torch.int64, (batch * num_heads,)).clone()
    if f"{prefix}.pending.key" in tensors:
        key = tensors.take(f"{prefix}.pending.key", dtype, (batch, num_heads, None, shape.key_dim))
        value = tensors.take(f"{prefix}.pending.value", dtype, (batch, num_heads, key.shape[2], shape.value_dim))
        positions = tensors.take(f"{prefix}.pending.positions", torch.int64, (batch, key.shape[2]))
        device = arena.device
        pending = Chunk(key.to(device, copy=True), value.to(device, copy=True), positions.clone())
    layer.resume(counts, pending, decoded=fields.read("decoded", whole, 0))
    _check_counts(store, layer, length, prefix)
    total = int(length.sum())
    entries = {
        name: tensors.take(f"{prefix}.{name}", free.dtype, (total, *free.shape[1:]))
        for name, free in arena.entries.items()
    }
    beside = {name: tensors.take(f"{prefix}.{name}", own.dtype, own.shape) for name, own in arena.beside.items()}
    _check_entries(layer, length, entries, prefix)
    arena.fill(length, arena.room(length, layer.capacity), entries, beside)


def _check_counts(store: RaggedStore, layer: StoreLayer, length: Tensor, prefix: str) -> None:
    """Tables that the store will compute addresses from. length: int64 [S], entries of each segment"""
    _check(layer.seen, 0, MAX_TOKENS, f"{prefix}.seen")
    _check(layer.evicted_at, 0, layer.seen, f"{prefix}.evicted_at")
    _check(layer.settled, 0, MAX_TOKENS, f"{prefix}.pending.positions, counted,")
    settled = layer.settled.repeat_interleave(store.num_heads)
    _check(length, 0, settled, f"{prefix}.length")
    floor = store.least_capacity if bool(settled.any()) else 0
    _check(layer.table, floor, UNLIMITED, f"{prefix}.table")
    if store.decode_mode == "evict":
        _check(length, 0, layer.capacity, f"{prefix}.length")
    if (pending := layer.pending) is not None:
        steps = layer.settled[:, None] + (pending.positions >= 0).cumsum(1) - 1
        expected = torch.where(pending.positions < 0, -1, steps)
        _check(pending.positions, expected, expected, f"{prefix}.pending.positions")


def _check_entries(layer: StoreLayer, length: Tensor, entries: Mapping[str, Tensor], prefix: str) -> None:
    arena, positions = layer.arena, entries["positions"].long()
    segment = torch.arange(len(length)).repeat_interleave(length)
    settled = layer.settled.repeat_interleave(layer.num_heads)[segment]
    _check(positions, 0, settled - 1, f"{prefix}.positions")
    if bool(((segment * (MAX_TOKENS + 1) + positions).diff() <= 0).any()):
        raise KVPolicyError(f"'{prefix}.positions' does not rise within a KV head")
    for name in arena.columns:
        if not bool(torch.isfinite(entries[name]).all()):
            raise KVPolicyError(f"'{prefix}.{name}' holds numbers that are not finite")
    if "scores" in entries and bool(entries["scores"].isnan().any()):
        raise KVPolicyError(f"'{prefix}.scores' holds NaN")


def _check(values: Tensor, low: Tensor | int, high: Tensor | int, name: str) -> None:
    low, high = torch.as_tensor(low).expand(values.shape), torch.as_tensor(high).expand(values.shape)
    bad = (values < low) | (values > high)
    if bool(bad.any()):
        at = tuple(bad.nonzero()[0].tolist())
        raise KVPolicyError(
            f"'{name}' is {int(values[at])} at {list(at)}, expected a number from {int(low[at])} to {int(high[at])}"
        )
