"""Handing each attention call of a model to a handler of ours, for as long as a context lasts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel

from kvpolicy.errors import ModelError
from kvpolicy.integrations.transformers.attention.attachment import hold, release
from kvpolicy.integrations.transformers.attention.attention_call import Handler, handler_on, mark, unmark
from kvpolicy.integrations.transformers.model.wrappers import unwrapped


@contextmanager
def intercepted(model: PreTrainedModel, handlers: Mapping[nn.Module, Handler]) -> Iterator[None]:
    """Within the context each module in `handlers` has its attention answered by its handler.

    A forward over a cache of ours goes to that cache all the same. The model is left as it was, also after an error.
    Not for two threads on one model at a time.

    Raises `ModelError` for a model whose attention cannot be exchanged, and where one of these modules has a handler.
    """
    if any(handler_on(module) is not None for module in handlers):
        raise ModelError("this model's attention is already being probed; finish that first")
    model = unwrapped(model)
    hold(model)
    try:
        for module, handler in handlers.items():
            mark(module, handler)
        yield
    finally:
        for module in handlers:
            unmark(module)
        release(model)
