"""The state of the cache layers that transformers made: sliding windows, linear attention, placeholders.

Their attributes are tensors, plain values, and dicts of both. What a fresh layer of this model has says which
attributes there may be and of which kind, so that a file can set nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvpolicy.cache.copies import copy_with
from kvpolicy.cache.state import Tensors
from kvpolicy.errors import KVPolicyError, ModelError
from kvpolicy.files.fields import Fields, describe, sequence, text

_LATE = {"dtype": None, "device": None}  # attributes that a layer has from its first tokens on


def tensors_of(layer: Any) -> dict[str, Tensor]:
    """The tensors of a stock layer, by attribute; those in lists and dicts too."""
    tensors = {}
    for name, value in vars(layer).items():
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, dict):
            tensors |= {f"{name}.{key}": x for key, x in value.items() if isinstance(x, Tensor)}
    return tensors


def copied(state: Any) -> Any:
    """A stock layer's attributes in memory of their own: some layers write in place."""
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, dict):
        return {name: copied(value) for name, value in state.items()}
    return [copied(value) for value in state] if isinstance(state, list) else state


def copied_layer(layer: Any) -> Any:
    """The same layer in memory of its own."""
    return copy_with(layer, **copied(vars(layer)))


def refill(layer: Any, attributes: dict[str, Any]) -> None:
    """Gives a stock layer these attributes and no others."""
    vars(layer).clear()
    vars(layer).update(attributes)


def pack_stock(layer: Any, prefix: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, and JSON values. Raises `ModelError` for a layer whose state is of another kind."""
    tensors: dict[str, Tensor] = {}

    def plain(value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            tensors[name] = value
            return {"tensor": name}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {"device": None}
        if isinstance(value, dict) and all(isinstance(key, int) for key in value):
            return {"items": [[key, plain(item, f"{name}.{key}")] for key, item in value.items()]}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise ModelError(f"{type(layer).__name__}.{name} is a {type(value).__name__}, which cannot be saved")

    kind = type(layer).__name__
    return tensors, {"class": kind, "state": {name: plain(x, f"{prefix}.{name}") for name, x in vars(layer).items()}}


def unpack_stock(
    layer: Any, fields: Fields, tensors: Tensors, device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    """Gives a fresh layer the state that was saved.

    shape: (sequences, KV heads held here, most tokens) of its keys and values;  dtype: theirs

    Raises `ModelError` for a layer of another kind, `KVPolicyError` for a state that it cannot have.
    """
    if (kind := fields.read("class", text)) != type(layer).__name__:
        raise ModelError(f"{fields.path('class')} is {kind}, this transformers uses {type(layer).__name__} there")
    fresh = _LATE | vars(layer)
    state = fields.fields("state")
    for name, value in fields.mapping("state").items():
        path = state.path(name)
        if name not in fresh:
            raise ModelError(f"{path} is an attribute that {kind} of this transformers does not have")
        restored = _restored(value, fresh[name], tensors, device, path)
        if name in ("keys", "values") and restored is not None:
            _check_entries(restored, dtype, shape, path)
        elif isinstance(restored, Tensor | dict):
            _check_batch(restored, shape[0], path)
        setattr(layer, name, restored)
    if missing := vars(layer).keys() - fields.mapping("state").keys():
        raise ModelError(f"{state.path(min(missing))} is missing, which {kind} of this transformers has")


def _restored(value: Any, fresh: Any, tensors: Tensors, device: torch.device, path: str) -> Any:
    """A saved value; `fresh` is what stands there at the start and says what may come."""
    if isinstance(value, dict):
        fields = Fields(value, path)
        if fields.has("tensor"):
            return _tensor(fields.read("tensor", text), fresh, tensors, device, path)
        if fields.has("items") and isinstance(fresh, dict):
            return _items(fields, fresh, tensors, device, path)
        if fields.has("dtype") and fresh is None:
            dtype = getattr(torch, fields.read("dtype", text), None)
            if isinstance(dtype, torch.dtype):
                return dtype
        elif "device" in value and fresh is None:
            return device
    elif isinstance(fresh, bool) or isinstance(value, bool):
        if isinstance(fresh, bool) and isinstance(value, bool):
            return value
    elif isinstance(fresh, int):
        # what is not zero at the start is a setting
        if isinstance(value, int) and value >= 0 and fresh in (0, value):
            return value
    elif value == fresh or (fresh is None and isinstance(value, int)):
        return value
    raise KVPolicyError(f"{path} is {describe(value)}, but a fresh layer has {describe(fresh)} there")


def _tensor(name: str, fresh: Any, tensors: Tensors, device: torch.device, path: str) -> Tensor | int:
    tensor = tensors.take(name)
    if isinstance(fresh, int) and not isinstance(fresh, bool) and not tensor.is_floating_point() and not tensor.dim():
        return int(tensor)  # transformers 5.17 counts in a tensor once something was taken back
    if fresh is None or (isinstance(fresh, Tensor) and (tensor.dtype, tensor.shape) == (fresh.dtype, fresh.shape)):
        return tensor.to(device, copy=True)
    raise KVPolicyError(f"{path} is a tensor {list(tensor.shape)}, which a fresh layer does not have there")


def _items(fields: Fields, fresh: dict[int, Any], tensors: Tensors, device: torch.device, path: str) -> dict[int, Any]:
    items = [sequence(item, fields.path(f"items[{i}]"), 2) for i, item in enumerate(fields.read("items", sequence))]
    if [key for key, _ in items] != list(fresh):
        raise KVPolicyError(f"{path} has the keys {[key for key, _ in items]}, expected {list(fresh)}")
    return {key: _restored(item, fresh[key], tensors, device, f"{path}[{key}]") for key, item in items}


def _check_entries(tensor: Any, dtype: torch.dtype, shape: tuple[int, int, int], path: str) -> None:
    batch, heads, most = shape
    fits = isinstance(tensor, Tensor) and tensor.dim() == 4 and tuple(tensor.shape[:2]) == (batch, heads)
    if not fits or tensor.shape[2] > most or tensor.dtype != dtype:
        raise KVPolicyError(f"{path} does not fit: expected {dtype} [{batch}, {heads}, up to {most}, dim]")


def _check_batch(value: Tensor | dict[int, Any], batch: int, path: str) -> None:
    for tensor in value.values() if isinstance(value, dict) else [value]:
        if isinstance(tensor, Tensor) and tensor.dim() and tensor.shape[0] != batch:
            raise KVPolicyError(f"{path} is for {tensor.shape[0]} sequences, expected {batch}")
