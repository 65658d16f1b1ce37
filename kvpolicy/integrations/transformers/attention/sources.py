"""What a policy may require of a layer's forward besides queries, keys and values."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from kvpolicy.integrations.transformers.attention.attention_modules import attention_modules
from kvpolicy.integrations.transformers.attention.observe import hidden_of, output_weight
from kvpolicy.integrations.transformers.attention.rotary import find_rotary, rotary_of
from kvpolicy.model.spec import ModelSpec
from kvpolicy.plugins.source_table import supplied_by

_HOOKED = frozenset({"hidden_before", "attention_input", "rope"})
RUN_SOURCES = supplied_by("model")
"""What a transformers model can hand to a policy while it runs, besides what the store supplies."""

_NOW = threading.local()  # inputs of the layer that runs now, in this thread


class _Watched:
    """A model with caches whose policies look at the inputs of its layers.

    users:   how many caches do, copies of one counted once
    handles: of the hooks, which are there while the model is attached
    """

    def __init__(self, layers: Sequence[int]) -> None:
        self.layers, self.users = layers, 0
        self.handles: list[RemovableHandle] = []


_WATCHED: WeakKeyDictionary[PreTrainedModel, _Watched] = WeakKeyDictionary()
_LOCK = threading.RLock()  # a cache may be freed, and let go of its model, at any point


def prepare(model: PreTrainedModel, spec: ModelSpec, requires: frozenset[str]) -> None:
    """Raises `ModelError` for a model that cannot supply what a policy requires of it."""
    if "rotary" in requires:
        find_rotary(model, [attention for attention, _ in attention_modules(model, spec.budgeted_layers)])
    if requires & _HOOKED:
        attention_modules(model, spec.budgeted_layers)


def watch_inputs(model: PreTrainedModel, spec: ModelSpec, requires: frozenset[str], user: Any) -> None:
    """Has hooks see the inputs of the layers, if a policy requires any, for as long as `user` lives. They only look."""
    if not requires & _HOOKED:
        return
    with _LOCK:
        watched = _WATCHED.setdefault(model, _Watched(spec.budgeted_layers))
        watched.users += 1
        install_hooks(model)
    weakref.finalize(user, _leave, weakref.ref(model)).atexit = False


def install_hooks(model: PreTrainedModel) -> None:
    """Installs the hooks that caches of this model need, unless they are there."""
    with _LOCK:
        watched = _WATCHED.get(model)
        if watched is None or watched.handles:
            return
        for attention, block in attention_modules(model, watched.layers):
            watched.handles += [
                block.register_forward_pre_hook(_block_begins, with_kwargs=True),
                block.register_forward_hook(_block_ends, always_call=True),
                attention.register_forward_pre_hook(_attention_begins, with_kwargs=True),
            ]


def remove_hooks(model: PreTrainedModel) -> None:
    """Removes them; `install_hooks` brings them back."""
    with _LOCK:
        if (watched := _WATCHED.get(model)) is not None:
            for handle in watched.handles:
                handle.remove()
            watched.handles = []


def _leave(model_of: Callable[[], PreTrainedModel | None]) -> None:
    """A cache is gone."""
    with _LOCK:
        if (model := model_of()) is None:
            return
        watched = _WATCHED[model]
        watched.users -= 1
        if not watched.users:
            remove_hooks(model)
            del _WATCHED[model]


def layer_sources(module: nn.Module, spec: ModelSpec, requires: frozenset[str]) -> dict[str, Any]:
    """What `requires` asks of the layer that runs now."""
    sources = {name: value for name, value in getattr(_NOW, "inputs", {}).items() if name in requires}
    if "module" in requires:
        sources["module"] = module
    if "output_weight" in requires:
        sources["output_weight"] = output_weight(module, spec)
    if "rotary" in requires:
        sources["rotary"] = rotary_of(module)
    return sources


def _block_begins(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _NOW.inputs = {"hidden_before": hidden_of(args, kwargs)}


def _attention_begins(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    inputs = getattr(_NOW, "inputs", {})
    inputs |= {"attention_input": hidden_of(args, kwargs), "rope": kwargs.get("position_embeddings")}
    _NOW.inputs = inputs


def _block_ends(*_: Any) -> None:
    _NOW.inputs = {}
