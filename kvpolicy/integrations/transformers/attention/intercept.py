"""Handing each attention call of a model to a handler of ours, for as long as a context lasts.

The handler sits on the attention module; every other module falls through to the model's own function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from kvpolicy.errors import ModelError
from kvpolicy.integrations.transformers.attention.exchange import (
    Attention,
    attention_name,
    register,
    set_attention,
    stock_attention,
)

_PREFIX = "kvpolicy_probe_"
_HANDLER = "_kvpolicy_handler"

Stock = Callable[[], tuple[Tensor, Any]]


class AttentionHandler(Protocol):
    """Takes the place of one module's attention function. `stock()` computes what the model would have."""

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any], stock: Stock
    ) -> tuple[Tensor, Any]: ...


@contextmanager
def intercepted(model: PreTrainedModel, handlers: Mapping[nn.Module, AttentionHandler]) -> Iterator[None]:
    """Within the context the attention of each module in `handlers` goes through its handler.

    The model is left as it was, also after an error. Not for two threads on one model at a time.
    Raises `ModelError` for a model whose attention cannot be exchanged.
    """
    base = attention_name(model)
    if base.startswith(_PREFIX):
        raise ModelError("this model's attention is already being probed; finish that first")
    name = _register(base)
    for module, handler in handlers.items():
        setattr(module, _HANDLER, handler)
    try:
        set_attention(model, name)
        yield
    finally:
        set_attention(model, base)
        for module in handlers:
            if hasattr(module, _HANDLER):
                delattr(module, _HANDLER)


def attention_modules(model: PreTrainedModel, layers: Sequence[int]) -> list[tuple[nn.Module, nn.Module]]:
    """(attention module, decoder layer) of each of these model layers, in order.

    Raises `ModelError` when a layer's attention module is not found or not unique.
    """
    modules = dict(model.named_modules())
    found: dict[int, list[str]] = {}
    for name, module in modules.items():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and "attention" in type(module).__name__.lower():
            found.setdefault(index, []).append(name)
    pairs = []
    for index in layers:
        names = found.get(index, [])
        # a decoder layer may be called after its attention and count layers too (Mllama): the innermost is meant
        names = [name for name in names if not any(other.startswith(f"{name}.") for other in names)]
        if len(names) != 1:
            raise ModelError(
                f"{type(model).__name__}: layer {index} has {len(names)} attention modules that kvpolicy recognises "
                "(expected 1): this architecture is not supported"
            )
        parent = names[0].rpartition(".")[0]
        pairs.append((modules[names[0]], modules[parent]))
    return pairs


def _register(base: str) -> str:
    """Registers our function for a base implementation once, and returns its name."""
    name = _PREFIX + base
    register(name, base, _dispatcher(base), ALL_MASK_ATTENTION_FUNCTIONS.get(base))
    return name


def _dispatcher(base: str) -> Attention:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
    ) -> tuple[Tensor, Any]:
        def stock() -> tuple[Tensor, Any]:
            return stock_attention(base, module)(module, query, key, value, mask, **options)

        handler: AttentionHandler | None = getattr(module, _HANDLER, None)
        return stock() if handler is None else handler(module, query, key, value, options, stock)

    return attention
