"""The transformers cache over a static store: its decoding step can be compiled and captured in a CUDA graph.

A prompt goes the way of every ragged cache, layer by layer, and each layer moves its part into the static store as soon
as it has been scored. From then on a forward of one token changes nothing in Python: the store is reached through one
opaque operator a layer, which a compiler neither looks into nor reorders.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from kvpolicy.cache.report import CacheReport
from kvpolicy.cache.scoring import Scoring
from kvpolicy.cache.static import StaticStore
from kvpolicy.cache.store import RaggedStore
from kvpolicy.errors import BudgetError, ModelError
from kvpolicy.integrations.transformers.attention.attention_call import Answer, AttentionCall, mark
from kvpolicy.integrations.transformers.attention.columns import Reading, seen_by
from kvpolicy.integrations.transformers.attention.masks import Seen, user_mask
from kvpolicy.integrations.transformers.cache.budgeted_layer import BudgetedLayer
from kvpolicy.integrations.transformers.cache.other_layers import tensors_of
from kvpolicy.integrations.transformers.cache.ragged_cache import RaggedCache

_STORES: WeakValueDictionary[int, StaticStore] = WeakValueDictionary()
"""By handle, a constant in compiled code. Small numbers are used again, and what was compiled with them."""


@torch.library.custom_op("kvpolicy::static_attention", mutates_args=())
def static_attention(
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
    """One decoding step of one layer: `append`, if it owns its keys, and `attend`. query: [B, num_q_heads, 1, D].

    What it changes is behind `handle`, out of a compiler's sight; the layers of a step depend on one another.
    Returns [B, 1, num_q_heads, Dv].
    """
    store = _STORES[handle]
    if append:
        store.append(layer, key, value)
    return store.attend(layer, query, Scoring(scale, softcap, sink_logits)).transpose(1, 2)


@static_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    batch, num_q_heads, n, _dim = query.shape
    return query.new_empty(batch, n, num_q_heads, value.shape[-1])


class StaticLayer(BudgetedLayer):
    """One full-attention layer of a `StaticRaggedCache`."""

    cache: StaticRaggedCache
    is_compileable = True
    is_croppable = False

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """As in `BudgetedLayer`, for the prompt; after it, one token at a time.

        Raises `ModelError` for more than one, for a model that is not attached, and where a forward broke off before.
        """
        if not self.cache.decoding:
            if self.columns:
                raise ModelError("a prompt broke off before this one, or did not fit: reset() the cache, then feed it")
            return super().update(key_states, value_states)
        if self is self.cache.budgeted[0]:  # once a step
            self.cache.check_attached()
            self.cache.check_whole()
        if key_states.shape[2] != 1:
            raise ModelError(
                f"a static cache takes its prompt in one forward and then one token at a time, got "
                f"{key_states.shape[2]} tokens behind its prompt: feed them singly, reset() the cache for a new "
                "prompt, or leave static out"
            )
        self.arrived = 1
        return mark(key_states, self.attention), value_states

    def attention(self, call: AttentionCall) -> Answer:
        if not self.cache.decoding:
            return super().attention(call)
        if call.mask is not None:
            raise ModelError("a step of a static cache takes no 4-D attention mask: make the cache without static=True")
        append, self.arrived = bool(self.arrived), 0
        if not append:
            self.check_follower(call.module)
        options = (call.options.get("s_aux"), call.options.get("scaling"), call.options.get("softcap"))
        out = static_attention(call.query, call.key, call.value, *options, self.cache.handle, self.row, append)
        if append and self is self.cache.budgeted[-1]:  # earlier layers still ask how many came before
            self.cache.columns.add_(1)
        return out, None

    def read(self, mask: Any, count: int) -> Reading:
        """From the dense mask: the last token sees all that is no padding."""
        if not isinstance(mask, Tensor):
            return super().read(mask, count)
        valid = user_mask(mask)[:, 0, -1, -count:].cpu()
        return Reading(valid=None if bool(valid.all()) else valid)

    def finish(self) -> None:
        waiting = self.waiting is not None
        super().finish()
        if waiting:
            self.cache.settle(self.row)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if not self.cache.decoding:
            return super().get_mask_sizes(query_length)
        if torch.compiler.is_compiling():  # nothing can be looked at there; generate makes its mask before
            return 0, 0
        length = Seen(0)
        length.padding = self.columns - seen_by(self.cache.opened(), self.row)
        return length, 0

    def get_seq_length(self) -> Any:
        """A tensor, as of every cache that can be compiled; on the device once decoding has begun."""
        return self.cache.columns if self.cache.decoding else torch.tensor(self.columns)


class StaticRaggedCache(RaggedCache):
    """A `RaggedCache` at fixed addresses; `new_cache(..., static=True)` makes it.

    context_length: tokens that its capacities were made for; without a limit, as many entries are kept at most
    columns:  int64 [], tokens seen, padding included, on the device
    decoding: whether the prompt is in the static store
    """

    layer_class: ClassVar[type[BudgetedLayer]] = StaticLayer

    def __init__(self, *args: Any, context_length: int, **options: Any) -> None:
        super().__init__(*args, **options)
        self.context_length = context_length
        self.static: StaticStore | None = None
        self.handle = -1  # once there is a static store
        self.columns = torch.zeros((), dtype=torch.int64)
        self.decoding = False
        self._left = len(self.budgeted)  # layers whose prompt is not in the static store yet

    def begin(self, key: Tensor) -> None:
        super().begin(key)
        self.allocate(self.opened(), key.device, key.dtype)

    def allocate(self, store: RaggedStore, device: torch.device, dtype: torch.dtype) -> StaticStore:
        """The static store for what `store` will keep; the one there is, where it is right.

        Raises `BudgetError` where the one there is was made for another batch, device or dtype.
        """
        if (static := self.static) is not None:
            made, other = (static.batch_size, static.keys.device, static.keys.dtype), (store.batch_size, device, dtype)
            if made != other:
                raise BudgetError(
                    f"this static cache was made for a batch of {made[0]} on {made[1]} in {made[2]}, got {other[0]} on "
                    f"{other[1]} in {other[2]}: make another one"
                )
            return static
        self.static = StaticStore.beside(store, self.context_length, device=device, dtype=dtype)
        self.columns = self.columns.to(device)
        self.handle = next(handle for handle in itertools.count() if handle not in _STORES)
        _STORES[self.handle] = self.static
        return self.static

    def rehearse(self) -> None:
        """Makes decoding possible before a prompt, for a capture; `reset` ends it."""
        self.opened_static().rehearse()
        self.columns.zero_()
        self.decoding = True

    def settle(self, row: int) -> None:
        """Moves a layer's prompt into the static store and frees what held it until now.

        Under run-time allocation a later layer may still look at this one, so all of them move at the end.
        """
        store, static = self.opened(), self.opened_static()
        self._left -= 1
        for index in [row] if store.split is None else range(0 if self._left else len(self.budgeted)):
            layer = store.layers[index]
            assert layer is not None  # its prompt has been kept
            static.take(index, layer, self.context_length)
            layer.arena.release()
        if not self._left:
            static.replan()  # the work is shared by the lengths of all layers
            self.columns.fill_(self.budgeted[0].columns)
            self.decoding = True  # last: from here on every question goes to the static store

    def check_attached(self) -> None:
        """Raises `ModelError` for a model whose own attention would see the new token alone."""
        if not self.attached():
            raise ModelError("the model is not attached (any more): kvpolicy.attach(model) before its cache is used")

    def check_whole(self) -> StaticStore:
        """The static store. Raises `ModelError` where a prompt, or a step behind it, has not reached every layer."""
        self.opened()
        static = self.opened_static()
        if not self.decoding:
            raise ModelError("the prompt of this cache broke off, or did not fit: reset() it, then feed a prompt")
        if static.due != 0:
            raise ModelError(
                "a step broke off, and its token is in some layers only: reset() the cache, then feed the prompt again"
            )
        return static

    def opened_static(self) -> StaticStore:
        if self.static is None:
            raise ModelError("this cache is empty: a prompt comes first")
        return self.static

    def reset(self) -> None:
        """Forgets everything but its addresses, so that a captured graph serves the next prompt."""
        super().reset()
        self.decoding, self._left = False, len(self.budgeted)
        self.columns.zero_()
        if self.static is not None:
            self.static.clear()

    # --- accounting

    @property
    def lengths(self) -> Tensor:
        """int64 [L, B, H], entries each KV head holds now."""
        return self._tabulated(self.check_whole().lengths)

    @property
    def capacities(self) -> Tensor:
        """int64 [L, B, H], entries each KV head may hold."""
        return self._tabulated(self.check_whole().capacities)

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor held, tables and stock layers included; those of a prompt that is coming in, too."""
        static = 0 if self.static is None else self.static.nbytes
        coming = 0 if self.store is None else self.store.nbytes
        return static + coming + sum(tensor.nbytes for layer in self._stock() for tensor in tensors_of(layer).values())

    def report(self) -> CacheReport:
        """Who was kept, what it weighs, and whether anything was evicted at all."""
        static, prompt = self.check_whole(), super().report()
        seen = static.seen.cpu()
        entries = self.lengths.sum((0, 2))
        full = seen * len(self.budgeted) * static.num_heads
        dense = prompt.dense_nbytes * int(seen.sum()) // max(1, sum(prompt.seen))  # the prompt's, and what came since
        return replace(
            prompt,
            seen=tuple(seen.tolist()),
            entries=tuple(entries.tolist()),
            full=tuple(full.tolist()),
            nbytes=self.nbytes,
            dense_nbytes=dense,
            evicted=bool((entries < full).any()),
        )

    def seen_mask(self) -> Tensor:
        """As in `RaggedCache`."""
        if not self.decoding or self.budgeted[0].filled is not None:
            return super().seen_mask()
        columns = int(self.columns)
        padding = columns - self.check_whole().seen.cpu()
        return (torch.arange(columns)[None] >= padding[:, None]).long()

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if self.decoding:  # a step changes nothing in Python
            return self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def touch(self, layer: int, what: Any) -> None:
        if not self.decoding:  # a replay runs no Python: `check_whole` asks the store
            super().touch(layer, what)

    # --- what fixed addresses rule out

    def announce(self, count: int) -> None:
        if not self.decoding:
            super().announce(count)

    def activate_past_recording(self) -> None:
        raise self._refusal("assisted generation")

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        raise self._refusal("crop")

    def save(self, path: Any) -> None:
        raise self._refusal("save")

    def fork(self) -> RaggedCache:
        raise self._refusal("fork")

    def _take(self, rows: Tensor, on_stock: Any) -> None:
        raise self._refusal("beam search and other changes of the batch")

    def _refusal(self, what: str) -> ModelError:
        return ModelError(f"a static cache does not offer {what}: make the cache without static=True")

    def _tabulated(self, table: Tensor) -> Tensor:
        static = self.opened_static()
        return table.view(-1, static.batch_size, static.num_heads).cpu()
