"""Caches that keep every token, in fewer bits: transformers' own `QuantizedCache`, and KIVI's. Baselines, without a
budget in them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from transformers import Cache, PreTrainedModel, QuantizedCache
from transformers.utils import is_optimum_quanto_available

from kvpolicy.errors import ModelError
from kvpolicy.integrations.transformers.cache.kivi import kivi_cache

_BACKENDS: dict[str, tuple[str, dict[str, int]]] = {
    "fp8": ("fp8", {}),
    "int4": ("quanto", {"nbits": 4}),
    "int2": ("quanto", {"nbits": 2}),
}

_KIVI = {"kivi4": 4, "kivi2": 2}


def quantized_cache(model: PreTrainedModel, kind: str) -> Cache:
    """An empty cache in fewer bits, for a model that is not attached (`detached`).

    kind: transformers' `QuantizedCache` with its defaults in "fp8", or in "int4" and "int2", which need the package
        optimum-quanto; or "kivi4" and "kivi2", KIVI's own rule

    The prompt is quantized when it has been attended to. What follows is held as it is until 128 tokens have come
    (int4, int2), or as `KiviLayer` says. Raises `ModelError` where the package is missing, and where there is no such
    cache for this model.
    """
    if kind in _KIVI:
        return kivi_cache(model, _KIVI[kind])
    backend, options = _BACKENDS[kind]
    if backend == "quanto" and not is_optimum_quanto_available():
        raise ModelError(f"a cache in {kind} needs the package optimum-quanto: pip install optimum-quanto")
    try:
        return QuantizedCache(backend, model.config, **options)
    except (ValueError, ImportError) as error:
        raise ModelError(f"transformers makes no cache in {kind} for {type(model).__name__}: {error}") from None


def cache_nbytes(cache: Cache) -> int:
    """Bytes of every tensor that a stock cache holds: packed numbers, scales, zero points, and what is in full
    precision. Memory that several tensors share counts once.
    """
    tensors = [x for layer in cache.layers for value in vars(layer).values() for x in _plain_tensors(value)]
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _plain_tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a value that have memory of their own: those inside containers, and inside tensors made of others,
    whose own size is that of the numbers they stand for.
    """
    if hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from _plain_tensors(getattr(value, name))
    elif isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _plain_tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _plain_tensors(item)
