"""A filled cache as a file, to go on with later or elsewhere.

The file is safetensors: tensors by name, and one JSON text. Nothing in it is code.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors.torch import save as to_bytes
from torch import Tensor

from kvpolicy.cache import state
from kvpolicy.cache.schedule import Fixed
from kvpolicy.errors import KVPolicyError
from kvpolicy.files.fields import render
from kvpolicy.files.regular import write_bytes
from kvpolicy.integrations.transformers.cache.budgeted_layer import BudgetedLayer
from kvpolicy.integrations.transformers.cache.other_layers import pack_stock
from kvpolicy.integrations.transformers.cache.sharing_layer import SharingLayer
from kvpolicy.model.spec import ModelSpec

if TYPE_CHECKING:
    from kvpolicy.integrations.transformers.cache.ragged_cache import RaggedCache

FORMAT = "kvpolicy-cache"
VERSION = 3  # since entries lie by position; before that they lay as in memory
KEY = "kvpolicy"  # of the JSON text in the file's metadata
CHECKSUM = "crc32"  # and of the checksum in it


def save_cache(cache: RaggedCache, path: str | os.PathLike[str]) -> None:
    """Writes a filled cache to `path` in one step: readers see the old file or the new one, never a part.

    Under tensor parallelism each process writes a file of its own.

    Raises `ModelError` for a cache that is empty or in the middle of a forward, `PluginError` for a policy or an
    allocator that is not registered, `KVPolicyError` naming the path and the reason where it cannot be written.
    """
    try:
        data = _to_bytes(cache)
    except KVPolicyError as error:
        raise type(error)(f"the cache was not saved: {error}") from None
    try:
        write_bytes(path, data)
    except KVPolicyError as error:
        raise KVPolicyError(f"the cache was not saved: {error}") from None


def _to_bytes(cache: RaggedCache) -> bytes:
    cache.settle()
    store, budgeted = cache.opened(), cache.budgeted
    tensors, meta = state.pack(store)
    table = None
    if isinstance(store.schedule, Fixed):
        tensors["fixed"], table = store.schedule.table, {"asked": store.schedule.asked}
    if cache.unfed is not None:
        tensors["unfed"] = cache.unfed
    if cache.state.deltas is not None:
        tensors["rope_deltas"] = cache.state.deltas
    if budgeted[0].filled is not None:
        tensors["filled"] = budgeted[0].filled
    stock: list[Any] = []
    for index, layer in enumerate(cache.layers):
        is_ours = isinstance(layer, BudgetedLayer | SharingLayer)
        packed, values = ({}, None) if is_ours else pack_stock(layer, f"stock.{index}")
        tensors |= packed
        stock.append(values)
    tensors = {name: _owned(tensor) for name, tensor in sorted(tensors.items())}
    document = {
        "format": FORMAT,
        "version": VERSION,
        "made_by": {"transformers": transformers.__version__},
        "model": identity(cache.spec, next(layer.arena.like.dtype for layer in store.layers if layer is not None)),
        "recipe": cache.recipe.to_json(),
        "fixed": table,
        "store": meta,
        "columns": [layer.columns for layer in budgeted],
        "has_holes": [layer.filled is not None for layer in budgeted],
        "recording": cache.recording,
        "ended": cache.ended,
        "stock": stock,
    }
    return file_bytes(document, tensors)


def file_bytes(document: dict[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """The file, with a checksum over all of it in the document."""
    return to_bytes(dict(tensors), {KEY: render(document | {CHECKSUM: crc32(document, tensors)})})


def identity(spec: ModelSpec, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "model_type": spec.model_type,
        "config_sha256": spec.config_sha256,
        "table_shape": list(spec.table_shape),
        "dtype": str(dtype).removeprefix("torch."),
    }


def _owned(tensor: Tensor) -> Tensor:
    """On the CPU, contiguous, in memory of its own: safetensors takes no views."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def crc32(document: dict[str, Any], tensors: Mapping[str, Tensor]) -> int:
    """Checksum of a document and of the names, dtypes, shapes and contents of tensors."""
    result = zlib.crc32(render(document).encode())
    for name, tensor in sorted(tensors.items()):
        result = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), result)
        result = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, result)
    return result
