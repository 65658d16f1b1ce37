"""A forward that a cache may answer in the model's place, by replaying a CUDA graph.

Whoever decodes calls the model for each token: `generate`, a loop of the user's own, an assistant. So that all of them
get what is fast, it stands where they look: on the model that is attached, in front of its own forward. Every call that
is not a decoded token over a cache of ours goes on to the model's own.
"""

from __future__ import annotations

import inspect
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from transformers import Cache, PreTrainedModel

_NAME = "forward"


class ReplayedForward:
    """Stands for a model's forward while it is attached. The model is not kept alive by it.

    before: what stood on the model itself, where another library has put one of its own there (accelerate)
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = weakref.ref(model)
        self.before: Callable[..., Any] | None = vars(model).get(_NAME)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._model(),)  # the copy of a model has one of its own

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.own)

    @property
    def own(self) -> Callable[..., Any]:
        """The model's own forward."""
        if self.before is not None:
            return self.before
        model = self._model()
        assert model is not None  # which is who is called
        return types.MethodType(type(model).forward, model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        own = self.own
        if torch.compiler.is_compiling():
            return own(*args, **kwargs)
        cache = next((value for value in kwargs.values() if isinstance(value, Cache)), None)
        replay = getattr(cache, "replay", None)
        if replay is not None and len(args) < 2:
            named = dict(zip(("input_ids",), args, strict=False)) | kwargs
            if (out := replay(self._model(), own, named)) is not None:
                return out
        return own(*args, **kwargs)


def install(model: PreTrainedModel) -> None:
    """Puts it in front of the model's forward, unless it is there."""
    if not isinstance(vars(model).get(_NAME), ReplayedForward):
        setattr(model, _NAME, ReplayedForward(model))


def remove(model: PreTrainedModel) -> None:
    """Gives the model what it had. Where another library has put one of its own in front since, it stays behind it."""
    current = vars(model).get(_NAME)
    if isinstance(current, ReplayedForward):
        delattr(model, _NAME)
        if current.before is not None:
            setattr(model, _NAME, current.before)
