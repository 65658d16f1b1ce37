"""Attaching a model, so that its attention can run over a ragged cache. Stock caches work as before.

Attaching is a name in the configuration, and a forward in front of the model's own that lets a cache answer for a
decoded token (`replaying`). All that is kept besides is how many contexts want a model attached. (What some models note
of a text on themselves travels with its cache: `model_state`.)
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel

from kvpolicy.integrations.transformers.attention import replaying
from kvpolicy.integrations.transformers.attention.attention_call import PREFIX, register
from kvpolicy.integrations.transformers.attention.exchange import attention_name, set_attention, text_config
from kvpolicy.integrations.transformers.attention.sources import install_hooks, remove_hooks
from kvpolicy.integrations.transformers.model.versions import warn_if_untested
from kvpolicy.integrations.transformers.model.wrappers import unwrapped


def attach(model: PreTrainedModel) -> None:
    """Lets the model run over caches of kvpolicy. Attaching twice is attaching once.

    Raises `ModelError` for a model whose attention cannot be exchanged, and as `unwrapped` does.
    """
    model = unwrapped(model)
    if is_attached(model):
        return
    warn_if_untested()
    set_attention(model, register(attention_name(model)))
    replaying.install(model)
    install_hooks(model)


def detach(model: PreTrainedModel) -> None:
    """Gives the model its own attention back. A ragged cache raises when it is used on it afterwards."""
    model = unwrapped(model)
    if is_attached(model):
        set_attention(model, attention_name(model).removeprefix(PREFIX))
        replaying.remove(model)
        remove_hooks(model)


def hold(model: PreTrainedModel) -> None:
    """Attaches the model until `release` was called as often, in whatever thread. Raises what `attach` raises."""
    with _LOCK:
        count, before = _HOLDS.get(model, (0, is_attached(model)))
        attach(model)
        _HOLDS[model] = count + 1, before


def release(model: PreTrainedModel) -> None:
    """Ends a `hold`. The last one leaves the model as the first one found it."""
    with _LOCK:
        count, before = _HOLDS.pop(model)
        if count > 1:
            _HOLDS[model] = count - 1, before
        elif not before:
            detach(model)


# how often a model is held, and whether it was attached before
_HOLDS: WeakKeyDictionary[PreTrainedModel, tuple[int, bool]] = WeakKeyDictionary()
_LOCK = threading.Lock()


def is_attached(model: PreTrainedModel) -> bool:
    return attention_name(model).startswith(PREFIX)


def attachment_of(model: PreTrainedModel) -> Callable[[], bool]:
    """Tells later on whether the model is still attached, without keeping the model alive."""
    config = text_config(model)
    return lambda: str(config._attn_implementation).startswith(PREFIX)
