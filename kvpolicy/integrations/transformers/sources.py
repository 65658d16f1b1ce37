"""What a policy may require of a layer's forward besides queries, keys and values."""

from __future__ import annotations

import threading
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedModel

from kvpolicy.integrations.transformers.intercept import attention_modules
from kvpolicy.integrations.transformers.observe import hidden_of, output_weight
from kvpolicy.integrations.transformers.rotary import find_rotary, rotary_of
from kvpolicy.spec import ModelSpec

_HOOKED = frozenset({"hidden_before", "attention_input", "rope"})
RUN_SOURCES = _HOOKED | {"module", "output_weight", "rotary", "repeat_attention"}
"""What a transformers model can hand to a policy while it runs, besides what the store supplies."""

_NOW = threading.local()  # inputs of the layer that runs now, in this thread
_INSTALLED: WeakKeyDictionary[nn.Module, None] = WeakKeyDictionary()


def prepare(model: PreTrainedModel, spec: ModelSpec, requires: frozenset[str]) -> None:
    """Installs, once, the hooks that see a layer's inputs, if a policy requires any. They only look.

    Raises `ModelError` for a model whose rotation is required and not understood.
    """
    if "rotary" in requires:
        find_rotary(model, [attention for attention, _ in attention_modules(model, spec.budgeted_layers)])
    if not requires & _HOOKED:
        return
    for attention, block in attention_modules(model, spec.budgeted_layers):
        if attention not in _INSTALLED:
            _INSTALLED[attention] = None
            block.register_forward_pre_hook(_block_begins, with_kwargs=True)
            block.register_forward_hook(_block_ends, always_call=True)
            attention.register_forward_pre_hook(_attention_begins, with_kwargs=True)


def layer_sources(module: nn.Module, spec: ModelSpec, requires: frozenset[str]) -> dict[str, Any]:
    """What `requires` asks of the layer that runs now."""
    found = {name: value for name, value in getattr(_NOW, "inputs", {}).items() if name in requires}
    if "module" in requires:
        found["module"] = module
    if "output_weight" in requires:
        found["output_weight"] = output_weight(module, spec)
    if "rotary" in requires:
        found["rotary"] = rotary_of(module)
    return found


def _block_begins(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _NOW.inputs = {"hidden_before": hidden_of(args, kwargs)}


def _attention_begins(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    inputs = getattr(_NOW, "inputs", {})
    inputs |= {"attention_input": hidden_of(args, kwargs), "rope": kwargs.get("position_embeddings")}
    _NOW.inputs = inputs


def _block_ends(*_: Any) -> None:
    _NOW.inputs = {}
