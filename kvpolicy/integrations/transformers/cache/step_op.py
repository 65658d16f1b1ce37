"""One decoding step of one layer as an operator that a compiler neither looks into nor reorders.

The cache behind it changes, out of a compiler's sight; the layers of a step depend on one another.
"""

from __future__ import annotations

import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from kvpolicy.cache.scoring import Scoring
from kvpolicy.integrations.transformers.attention.attention_call import Answer, AttentionCall, as_answer, mark

_CACHES: WeakValueDictionary[int, Any] = WeakValueDictionary()
"""By handle, a constant in compiled code. Small numbers are used again, and what was compiled with them."""


def handle_of(cache: Any, before: int) -> int:
    """A number for a cache, as long as it lives.

    before: the one that it has; if it is a copy, that may be the other's
    """
    if _CACHES.get(before) is cache:
        return before
    handle = next(number for number in itertools.count() if number not in _CACHES)
    _CACHES[handle] = cache
    return handle


@torch.library.custom_op("kvpolicy::step_attention", mutates_args=())
def step_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink_logits: Tensor | None,
    scale: float | None,
    softcap: float | None,
    handle: int,
    layer: int,
    append: bool,
) -> Tensor:
    """The attention of a token, which is written before by the layer that owns its key. query: [B, num_q_heads, 1, D].

    Returns [B, 1, num_q_heads, Dv].
    """
    scoring = Scoring(scale, softcap, sink_logits)
    out: Tensor = _CACHES[handle].step(layer, query, key, value, scoring, append=append)
    return out.transpose(1, 2).contiguous()


@step_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    batch, num_q_heads, n, _dim = query.shape
    return query.new_empty(batch, n, num_q_heads, value.shape[-1])


class SteppedLayer:
    """A layer of the model in a step. A compiler looks on.

    handle: of the cache
    layer:  which of the model's layers owns the keys
    keeps:  whether the keys that come are its own; else they are those of a layer that keeps none (`SharingLayer`)
    """

    def __init__(self, handle: int, layer: int, *, keeps: bool = True) -> None:
        self.handle, self.layer, self.keeps, self._has_come = handle, layer, keeps, False

    def update(self, key: Tensor) -> Tensor:
        """The key of the token, marked. key: [B, H, 1, D]"""
        self._has_come = self.keeps
        return mark(key, self.attention)

    def attention(self, call: AttentionCall) -> Answer:
        """The attention of the layer, or of one that reuses its keys and values."""
        append, self._has_come = self._has_come, False
        if not torch.compiler.is_compiling():  # an operator takes longer to be called than its work on a CPU
            cache = _CACHES[self.handle]
            return as_answer(cache.step(self.layer, call.query, call.key, call.value, call.scoring, append=append))
        options = (call.options.get("s_aux"), call.options.get("scaling"), call.options.get("softcap"))
        out: Tensor = step_attention(call.query, call.key, call.value, *options, self.handle, self.layer, append)
        return out, None
