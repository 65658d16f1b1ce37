"""One call of a model's attention, and who answers it.

transformers calls the function that a name in the model's configuration stands for. Ours makes one value of what it is
given and hands it to a handler. That of a cache's layer is on the key tensor, which the cache has returned to the
model: so two caches on one model, stepped alternately or in two threads, cannot meet. That of a probe is on the
attention module, for as long as the probe looks. Where there is neither, the model's own attention answers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvpolicy.cache.scoring import Scoring
from kvpolicy.errors import ModelError
from kvpolicy.integrations.transformers.attention.masks import dense_mask, make_mask

PREFIX = "kvpolicy_"
_HANDLER = "_kvpolicy_handler"

Answer = tuple[Tensor, Any]
"""What attention functions of transformers return: [B, n, num_q_heads, Dv], and weights or None."""


@dataclass(frozen=True, slots=True, eq=False)
class AttentionCall:
    """What a model asks of its attention.

    base:    the implementation that ours stands in front of
    module:  the attention module
    query:   [B, num_q_heads, n, D]
    key:     [B, H, n, D] and value: [B, H, n, Dv], as a cache's `update` has returned them
    mask:    what the mask function made; see `make_mask`
    options: scaling, softcap, s_aux, position_ids, and what else the model hands on
    """

    base: str
    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    options: dict[str, Any]

    def stock(self) -> Answer:
        """What the model's own attention says."""
        function = _own_attention(self.base, self.module)
        return function(self.module, self.query, self.key, self.value, dense_mask(self.mask), **self.options)

    @property
    def scoring(self) -> Scoring:
        return Scoring(self.options.get("scaling"), self.options.get("softcap"), self.options.get("s_aux"))


Handler = Callable[[AttentionCall], Answer]
"""Answers in the place of a model's attention."""

Marked = TypeVar("Marked", Tensor, nn.Module)


def mark(target: Marked, handler: Handler) -> Marked:
    """Puts a handler on a key tensor or on an attention module, where the attention function looks for it."""
    setattr(target, _HANDLER, handler)
    return target


def unmark(module: nn.Module) -> None:
    delattr(module, _HANDLER)


def handler_on(target: Tensor | nn.Module) -> Handler | None:
    handler: Handler | None = getattr(target, _HANDLER, None)
    return handler


def register(base: str) -> str:
    """Registers our attention and mask functions in front of an implementation, once. Returns the name of both.

    Raises `ModelError` for a base that transformers lacks.
    """
    name = PREFIX + base
    if name in ALL_ATTENTION_FUNCTIONS.valid_keys():
        return name
    if base != "eager" and base not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        raise ModelError(f"the attention implementation '{base}' is unknown to transformers; use 'sdpa'")

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Answer:
        call = AttentionCall(base, module, query, key, value, mask, options)
        handler = handler_on(key)
        if handler is None:
            handler = handler_on(module)
        return call.stock() if handler is None else handler(call)

    def mask(**arguments: Any) -> Any:
        return make_mask(base, arguments)

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)
    return name


def _own_attention(base: str, module: nn.Module) -> Callable[..., Answer]:
    """The function that the model would have called; "eager" is defined beside each model."""
    if base == "eager":
        function: Callable[..., Answer] = sys.modules[type(module).__module__].eager_attention_forward
        return function
    chosen: Callable[..., Answer] = ALL_ATTENTION_FUNCTIONS[base]
    return chosen


def as_answer(out: Tensor) -> Answer:
    """out: [B, num_q_heads, n, Dv]"""
    return out.transpose(1, 2).contiguous(), None
