"""Reaching a model's attention without touching its code.

transformers looks the attention function up by the name in the config. `intercepted` puts a name of ours there for
as long as the context lasts; the function behind it hands each call to the handler that was put on the attention
module, and falls through to the model's own function for every other module.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvpolicy.errors import ModelError

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
    base = text_config(model)._attn_implementation
    if base.startswith(_PREFIX):
        raise ModelError("this model's attention is already being probed; finish that first")
    name = _register(base)
    for module, handler in handlers.items():
        setattr(module, _HANDLER, handler)
    try:
        model.set_attn_implementation(name)
        if text_config(model)._attn_implementation != name:
            raise ModelError(
                f"{type(model).__name__} does not let its attention be exchanged (it does not go through transformers' "
                "AttentionInterface); kvpolicy cannot measure or compress it"
            )
        yield
    finally:
        model.set_attn_implementation(base)
        for module in handlers:
            if hasattr(module, _HANDLER):
                delattr(module, _HANDLER)


def text_config(model: PreTrainedModel) -> Any:
    """The configuration of the language model, also of a vision-language model."""
    return model.config.get_text_config(decoder=True)


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
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        if base != "eager" and base not in ALL_ATTENTION_FUNCTIONS.valid_keys():
            raise ModelError(f"the attention implementation '{base}' is unknown to transformers; use 'sdpa'")
        AttentionInterface.register(name, _dispatcher(base))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


def _dispatcher(base: str) -> Callable[..., tuple[Tensor, Any]]:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
    ) -> tuple[Tensor, Any]:
        def stock() -> tuple[Tensor, Any]:
            result: tuple[Tensor, Any] = _stock_function(base, module)(module, query, key, value, mask, **options)
            return result

        handler: AttentionHandler | None = getattr(module, _HANDLER, None)
        return stock() if handler is None else handler(module, query, key, value, options, stock)

    return attention


def _stock_function(base: str, module: nn.Module) -> Callable[..., tuple[Tensor, Any]]:
    """The function the model would have called; "eager" is defined beside each model."""
    if base == "eager":
        function: Callable[..., tuple[Tensor, Any]] = sys.modules[type(module).__module__].eager_attention_forward
        return function
    chosen: Callable[..., tuple[Tensor, Any]] = ALL_ATTENTION_FUNCTIONS[base]
    return chosen
