"""One full-attention layer of a cache: `update` marks the new keys and values, and attention runs over the store."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from kvpolicy.cache.copies import copy_with
from kvpolicy.cache.store import RaggedStore
from kvpolicy.errors import ModelError
from kvpolicy.integrations.transformers.attention.attention_call import Answer, AttentionCall, as_answer, mark
from kvpolicy.integrations.transformers.attention.columns import (
    Reading,
    entry_masks,
    filled_columns,
    read_mask,
    seen_by,
)
from kvpolicy.integrations.transformers.attention.masks import LazyMask, Seen, user_mask
from kvpolicy.integrations.transformers.attention.sources import layer_sources
from kvpolicy.integrations.transformers.attention.tracing import untraced
from kvpolicy.integrations.transformers.cache.forwards import check_fed_once
from kvpolicy.integrations.transformers.cache.layer_state import LayerState, Waiting

if TYPE_CHECKING:
    from kvpolicy.integrations.transformers.cache.ragged_cache import RaggedCache


class BudgetedLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped
    """One full-attention layer of a `RaggedCache`.

    row:       index among the budgeted layers
    followers: layers that reuse this one's keys and values
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True  # `crop` says where it cannot

    def __init__(self, cache: RaggedCache, row: int, model_layer: int, followers: int) -> None:
        super().__init__()
        self._cache = weakref.ref(cache)  # which holds its layers: what is dropped is free at once
        self.row, self.model_layer, self.followers = row, model_layer, followers
        self.resume(LayerState())

    @property
    def cache(self) -> RaggedCache:
        cache = self._cache()
        assert cache is not None  # nobody else holds its layers
        return cache

    @property
    def state(self) -> LayerState:
        """How far it has come, for `resume`."""
        return LayerState(self.columns, self.filled, self.arrived, self.waiting)

    def resume(self, state: LayerState) -> None:
        """Goes on from there."""
        self.columns, self.filled = state.columns, state.filled
        self.arrived, self.waiting = state.arrived, state.waiting

    def fork(self, cache: RaggedCache) -> BudgetedLayer:
        """The same layer of a copy of its cache."""
        return copy_with(self, _cache=weakref.ref(cache))

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_cache": self.cache}  # so that the layers of a copied cache belong to the copy

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_cache": weakref.ref(state["_cache"])}

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys = self.values = torch.empty(0)  # Mllama asks every layer's
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Announces new tokens. key_states, value_states: [B, H, n, dim].

        Raises `ModelError` when tokens before these never reached our attention function.
        """
        cache = self.cache
        cache.begin(key_states)
        cache.budgeted[self.row - 1].check_enforced()  # the layer before, or of a forward before
        self.finish()  # followers that did not run in the forward before read nothing any more
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.arrived = key_states.shape[2]
        self.columns += self.arrived
        return mark(key_states, self.attention), value_states

    def reused(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """What a layer without entries of its own has attention called with: this layer's new keys and values, if
        somebody reads them, marked so that the call comes here. key, value: its own, [B, H, n, dim]
        """
        if self.waiting is not None and self.waiting.prompt:
            key, value = self.waiting.chunk.key, self.waiting.chunk.value
        return mark(key, self.attention), value

    def check_enforced(self) -> None:
        """Raises `ModelError` where keys and values came, but not their attention."""
        if self.arrived:
            raise ModelError(
                f"layer {self.model_layer}: keys and values came, but not their attention, so no budget was enforced: "
                "this model changes its keys after the cache, or a forward broke off. Make a new cache"
            )

    @untraced
    def attention(self, call: AttentionCall) -> Answer:
        """The attention of this layer, or of one that reuses its keys and values."""
        cache = self.cache
        store, scoring = cache.opened(), call.scoring
        if not self.arrived:
            self.check_follower(call.module)
            return self._follow(store, call)
        self.arrived = 0
        query, key, value, mask = call.query, call.key, call.value, call.mask
        if not self.row:  # once a forward
            check_fed_once(call.options.get("position_ids"), key.shape[2], seen_by(store, 0))
        reading = self.read(mask, key.shape[2], seen_by(store, self.row), may_be_cut=cache.recording)
        valid, self.filled = reading.valid, reading.filled
        # a token is written at once where it sees all entries and nobody may take it back
        plain = valid is None and reading.visible is None and (mask is None or isinstance(mask, LazyMask))
        if key.shape[2] == 1 and plain and not cache.recording and store.can_append(self.row):
            store.append(self.row, key, value)
            return as_answer(store.attend_newest(self.row, query, scoring))
        first = self.columns == key.shape[2]  # not where padding alone came before, which a mask still has columns for
        chunk = store.arrive(self.row, key, value, valid)
        extra = layer_sources(call.module, store.spec, store.policy.requires)
        waiting = Waiting(query, chunk, scoring, extra, first, self.followers, reading.visible)
        answer = self._over(store, call, waiting)
        self.waiting = waiting
        if not self.followers:  # else they would attend to what is left after eviction
            self.finish()
        return answer

    def count_step(self, reading: Reading) -> None:
        """Counts the token of a step."""
        self.columns += 1
        self.filled = reading.filled

    def check_follower(self, module: nn.Module) -> None:
        """Raises `ModelError` where attention comes a second time for one update, and from no other layer."""
        if not self.followers or getattr(module, "layer_idx", None) == self.model_layer:
            raise ModelError(
                f"layer {self.model_layer}: {type(module).__name__} attends several times to keys that it caches once, "
                "with other values each time; a budget keeps one value a key, so this model cannot run over it"
            )

    def read(self, mask: Any, count: int, seen: Tensor, *, may_be_cut: bool) -> Reading:
        """What the model's mask says of `count` new tokens and of those before. Arguments as in `read_mask`."""
        before = self.columns - count
        if isinstance(mask, LazyMask):
            return mask.read(before, seen, self.filled, may_be_cut=may_be_cut)
        return read_mask(None, count, before, seen, self.filled)

    def _follow(self, store: RaggedStore, call: AttentionCall) -> Answer:
        """A layer that reuses this one's keys and values, later in the same forward."""
        if (waiting := self.waiting) is None:
            return as_answer(store.attend(self.row, call.query, call.scoring))
        answer = self._over(store, call, waiting)
        waiting.count_reader()
        if not waiting.readers:
            self.finish()
        return answer

    def _over(self, store: RaggedStore, call: AttentionCall, waiting: Waiting) -> Answer:
        """Attention over what is held and the new tokens, under the model's mask."""
        if waiting.prompt:
            return call.stock()
        query, mask, chunk = call.query, call.mask, waiting.chunk
        within = shown = entries = None
        if isinstance(mask, LazyMask):
            within = mask.newest(len(chunk))
            shown = None if waiting.visible is None else waiting.visible[:, None, None]
        elif mask is not None:
            shown = user_mask(mask, self.columns).expand(query.shape[0], -1, -1, -1)
            within = shown[..., -len(chunk) :]
        if shown is not None:
            entries = entry_masks(shown, self.filled_columns(), store.positions(self.row), query.shape[2])
        return as_answer(store.attend_chunk(self.row, query, chunk, call.scoring, within, entries))

    def filled_columns(self) -> Tensor:
        """Those that hold a token, bool [B, columns]."""
        if self.filled is not None:
            return self.filled
        return filled_columns(self.columns, self.columns - seen_by(self.cache.opened(), self.row))

    def finish(self) -> None:
        """Lets the store keep its part of a prompt that nobody reads any more."""
        if (waiting := self.waiting) is None:
            return
        self.waiting, cache = None, self.cache  # first: what fails below is not kept a second time
        if cache.watch is not None:
            cache.watch(self.row, waiting)
            return
        # all of it before the repetition, which shows what matters
        hold = len(waiting.chunk) if cache.awaits_repeat else cache.rollback
        cache.opened().keep(self.row, waiting.query, waiting.chunk, waiting.scoring, hold=hold, extra=waiting.extra)

    def reset(self) -> None:
        """Forgets everything."""
        self.resume(LayerState())
        self.is_initialized = False

    def take_back(self, count: int) -> None:
        """Forgets the last `count` columns."""
        self.columns -= count
        self.filled = None if self.filled is None else self.filled[:, : self.columns]

    def take(self, rows: Tensor) -> None:
        """Keeps these rows, in this order. rows: int64 [B']."""
        self.filled = None if self.filled is None else self.filled[rows.cpu()]

    @untraced
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return Seen(self.columns + query_length), 0

    def get_seq_length(self) -> int:
        """Tokens seen, padding included; not the entries kept."""
        return self.columns

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:  # transformers 5.17
        return -1
