"""The transformers cache over a ragged store.

A budgeted layer answers `update` with the new keys and values alone, marked; its attention function then attends over
the store and lets it keep its part. All other layers are the stock ones. Masks and positions follow the tokens seen,
never the entries kept.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from kvpolicy.cache.arena import Chunk
from kvpolicy.cache.store import ROLLBACK, RaggedStore, Scoring
from kvpolicy.errors import BudgetError, ModelError
from kvpolicy.integrations.transformers.attachment import mark
from kvpolicy.integrations.transformers.columns import Reading, entry_masks, filled_columns, read_mask, seen_by
from kvpolicy.integrations.transformers.exchange import Attention, as_stock
from kvpolicy.integrations.transformers.forwards import check_fed_once
from kvpolicy.integrations.transformers.masks import LazyMask, Seen, dense_mask, user_mask
from kvpolicy.integrations.transformers.model_state import CarryingCache
from kvpolicy.integrations.transformers.sources import layer_sources
from kvpolicy.integrations.transformers.stock_state import tensors_of
from kvpolicy.integrations.transformers.tracing import untraced
from kvpolicy.integrations.transformers.waiting import Waiting
from kvpolicy.spec import ModelSpec

if TYPE_CHECKING:
    from kvpolicy.cache.report import CacheReport
    from kvpolicy.integrations.transformers.recipe import Recipe

StoreFactory = Callable[[int, tuple[int, int]], RaggedStore]
"""Makes the store once the batch size and the KV heads held here, (first, count), are known."""


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
        self.columns = 0  # tokens seen, padding included
        self.arrived = 0  # tokens whose attention has not come yet
        self.waiting: Waiting | None = None
        self.filled: Tensor | None = None  # bool [B, columns], those that hold a token; as in `Reading`

    @property
    def cache(self) -> RaggedCache:
        cache = self._cache()
        assert cache is not None  # nobody else holds its layers
        return cache

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
        self.cache.begin(key_states)
        self._finish()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.arrived = key_states.shape[2]
        self.columns += self.arrived
        return mark(key_states, self), value_states

    @untraced
    def attention(
        self, stock: Attention, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, options: Any
    ) -> tuple[Tensor, Any]:
        """The attention of this layer, or of one that reuses its keys and values. query: [B, num_q_heads, n, D].

        Returns [B, n, num_q_heads, Dv], and None for the weights.
        """
        store = self.cache.opened()
        scoring = Scoring(options.get("scaling"), options.get("softcap"), options.get("s_aux"))
        if not self.arrived:
            self.check_follower(module)
            return self._follow(stock, module, query, key, value, mask, options, scoring)
        self.arrived = 0
        if not self.row:
            check_fed_once(options.get("position_ids"), key.shape[2], seen_by(store, 0))
        reading = self.read(mask, key.shape[2])
        valid, self.filled = reading.valid, reading.filled
        plain = valid is None and reading.visible is None and (mask is None or isinstance(mask, LazyMask))
        if key.shape[2] == 1 and plain and not self.cache.recording and store.can_append(self.row):
            store.append(self.row, key, value)
            out = store.attend(self.row, query, scoring)
            store.rescore(self.row, query, scoring)
            return as_stock(out), None
        first = self.columns == key.shape[2]  # not where padding alone came before, which a mask still has columns for
        chunk = store.arrive(self.row, key, value, valid)
        if first:
            result = stock(module, query, key, value, dense_mask(mask), **options)
        else:
            result = as_stock(self._over_entries(store, query, chunk, mask, scoring, reading.visible)), None
        extra = layer_sources(module, store.spec, store.policy.requires)
        self.waiting = Waiting(query, chunk, scoring, extra, first, self.followers, reading.visible)
        if not self.followers:
            self._finish()
        return result

    def check_follower(self, module: nn.Module) -> None:
        """Raises `ModelError` where attention comes a second time for one update, and from no other layer."""
        if not self.followers or getattr(module, "layer_idx", None) == self.model_layer:
            raise ModelError(
                f"layer {self.model_layer}: {type(module).__name__} attends several times to keys that it caches once, "
                "with other values each time; a budget keeps one value a key, so this model cannot run over it"
            )

    def read(self, mask: Any, count: int) -> Reading:
        """What the model's mask says of `count` new tokens and of those before."""
        before, seen = self.columns - count, seen_by(self.cache.opened(), self.row)
        if isinstance(mask, LazyMask):
            return mask.read(before, seen, self.filled)
        return read_mask(None, count, before, seen, self.filled)

    def _follow(
        self,
        stock: Attention,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        options: Any,
        scoring: Scoring,
    ) -> tuple[Tensor, Any]:
        """A layer that reuses this one's keys and values, later in the same forward."""
        store, waiting = self.cache.opened(), self.waiting
        if waiting is None:
            return as_stock(store.attend(self.row, query, scoring)), None
        if waiting.prompt:
            result = stock(module, query, key, value, dense_mask(mask), **options)
        else:
            result = as_stock(self._over_entries(store, query, waiting.chunk, mask, scoring, waiting.visible)), None
        waiting.left -= 1
        if not waiting.left:
            self._finish()
        return result

    def _over_entries(
        self, store: RaggedStore, query: Tensor, chunk: Chunk, mask: Any, scoring: Scoring, visible: Tensor | None
    ) -> Tensor:
        """Attention over what is held and a chunk, under the model's mask. visible: of a 2-D one, as in `Reading`."""
        within = None
        if isinstance(mask, LazyMask):
            within, shown = mask.newest(len(chunk)), None if visible is None else visible[:, None, None]
        elif mask is None:
            shown = None
        else:
            shown = user_mask(mask, self.columns).expand(query.shape[0], -1, -1, -1)
            within = shown[..., -len(chunk) :]
        if shown is None:
            return store.attend_chunk(self.row, query, chunk, scoring, within)
        entries = entry_masks(shown, self.filled_columns(), store.positions(self.row), query.shape[2])
        return store.attend_chunk(self.row, query, chunk, scoring, within, entries)

    def filled_columns(self) -> Tensor:
        """Those that hold a token, bool [B, columns]."""
        if self.filled is not None:
            return self.filled
        return filled_columns(self.columns, self.columns - seen_by(self.cache.opened(), self.row))

    def _finish(self) -> None:
        """Lets the store keep its part of a prompt that nobody reads any more."""
        if (waiting := self.waiting) is None:
            return
        self.waiting, cache = None, self.cache
        if cache.watch is not None:
            cache.watch(self.row, waiting)
            return
        hold = cache.rollback if cache.recording else 0
        if cache.awaits_repeat:
            hold = len(waiting.chunk)
        cache.opened().keep(self.row, waiting.query, waiting.chunk, waiting.scoring, hold=hold, extra=waiting.extra)

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


class RaggedCache(CarryingCache):
    """A transformers cache whose full-attention layers keep what their budget allows; see `new_cache`.

    spec:         the model's layers and heads
    make_store:   makes the store when the first tokens come
    stock_layers: what a stock cache holds, one for each model layer (layers that reuse others' may be missing)
    attached:     tells whether the model still is
    rank:         tensor-parallel rank of this process
    rollback:     last tokens that stay above the capacity while they may be taken back (assisted generation)
    recipe:       what the cache was made from, needed to save it
    repeats:      whether the context has to be repeated (`repeat_context`) before the budget can be enforced

    watch: takes the tokens of a forward instead of the store, while the context is repeated
    unfed: tokens [B, k] that the last turn generated and nobody has fed; `kvpolicy.generate` does
    ended: why no further turn can follow, or None
    """

    layer_class: ClassVar[type[BudgetedLayer]] = BudgetedLayer

    def __init__(
        self,
        spec: ModelSpec,
        make_store: StoreFactory,
        stock_layers: list[Any],
        attached: Callable[[], bool],
        *,
        rank: int = 0,
        rollback: int = ROLLBACK,
        recipe: Recipe | None = None,
        repeats: bool = False,
        dropped_at: int | None = None,
    ) -> None:
        layers: list[Any] = list(stock_layers)
        self.budgeted: list[BudgetedLayer] = []
        for row, index in enumerate(spec.budgeted_layers):
            followers = sum(layer.shared_with == index for layer in spec.layers)
            self.budgeted.append(self.layer_class(self, row, index, followers))
            layers[index] = self.budgeted[-1]
        attends = (i for i, layer in enumerate(spec.layers) if layer.kind != "linear" and layer.shared_with is None)
        super().__init__(layers, max(attends), dropped_at)
        self.attached = attached
        self.spec, self.make_store, self.rank, self.rollback = spec, make_store, rank, rollback
        self.store: RaggedStore | None = None
        self.recipe, self.repeats = recipe, repeats
        self.watch: Callable[[int, Waiting], None] | None = None
        self.recording = False
        self.unfed: Tensor | None = None
        self.ended: str | None = None

    def begin(self, key: Tensor) -> None:
        """Makes the store when the first keys come. key: [B, H, n, D]."""
        self.check_enforced()
        if self.store is not None:
            return
        batch, count = int(key.shape[0]), int(key.shape[1])
        whole = self.spec.num_kv_heads
        if whole % count:
            raise ModelError(f"a rank holds {count} KV heads, no divisor of the model's {whole}")
        first = self.rank * count if count < whole else 0
        self.store = self.make_store(batch, (first, count))

    def check_enforced(self) -> None:
        """Raises `ModelError` where keys and values came to a layer, but not their attention."""
        for layer in self.budgeted:
            if layer.arrived:
                raise ModelError(
                    f"layer {layer.model_layer}: keys and values came, but not their attention, so no budget was "
                    "enforced: this model changes its keys after the cache, or a forward broke off. Make a new cache"
                )

    def check_ended(self) -> None:
        self.check_enforced()
        super().check_ended()

    @property
    def awaits_repeat(self) -> bool:
        """Whether every token is still held, until `repeat_context` has shown which entries the budget is for."""
        last = None if not self.repeats or self.store is None else self.store.layers[-1]
        return self.repeats and (last is None or not last.arena.width)

    def check_repeated(self) -> None:
        """Raises `ModelError` where the budget waits for the context to be repeated."""
        if self.awaits_repeat and self.watch is None:
            self.withdraw()
            raise ModelError(
                "this cache still holds every token, as its policy requires repeat_attention: after the prompt, before "
                "decoding, call kvpolicy.repeat_context(model, cache, input_ids, tokenizer), or let "
                "kvpolicy.generate(model, cache, input_ids, tokenizer=tokenizer) do both"
            )

    def opened(self) -> RaggedStore:
        if self.store is None:
            raise ModelError("this cache is empty: a prompt comes first")
        return self.store

    # --- what transformers calls on a cache

    @untraced
    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """As in transformers. Raises `ModelError` for a model that is not attached, and for a cache that offloads."""
        if not self.attached():
            raise ModelError("the model is not attached (any more): kvpolicy.attach(model) before its cache is used")
        if self.offloading:
            raise ModelError("this cache cannot be offloaded: attention reads its entries after update() has returned")
        if key_states.shape[2] == 1 and self.budgeted[-1].columns:  # not a prompt of one token
            self.check_repeated()
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def activate_past_recording(self) -> None:
        """Assisted generation begins: the last `rollback` tokens can be taken back from now on."""
        self.check_repeated()
        self.recording = True
        for layer in self._stock():
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()

    def stop_recording(self) -> None:
        """Ends what `activate_past_recording` began; transformers never does."""
        self.recording = False
        for layer in self._stock():
            if getattr(layer, "record_past", False):
                layer.crop(0)  # lets it go back to its working size, without which the next forward fails
                layer.record_past = False

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Takes back the last tokens; given as a number <= 0, as everywhere in transformers.

        Raises `BudgetError` where entries were evicted since, so that the cache would not be what it was.
        """
        count = int(tokens_to_remove)
        if count > 0:
            raise BudgetError(f"crop takes the number of tokens to remove as a negative number, got {count}")
        self._settle()
        if self.store is not None and count:
            self._crop_store(-count)
        for layer in self.budgeted:
            layer.columns += count
            layer.filled = None if layer.filled is None else layer.filled[:, : layer.columns]
        for layer in self._stock():
            layer.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: row i becomes what row `beam_idx[i]` was, capacities included."""
        self._take(beam_idx, lambda layer: layer.reorder_cache(beam_idx))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows. indices: int64 [B'], or bool [B]."""
        rows = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
        self._take(rows, lambda layer: getattr(layer, "batch_select_indices", layer.reorder_cache)(rows))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row `repeats` times."""
        batch = 1 if self.store is None else self.store.batch_size
        rows = torch.arange(batch).repeat_interleave(repeats)
        self._take(rows, lambda layer: getattr(layer, "batch_select_indices", layer.reorder_cache)(rows))

    def reset(self) -> None:
        """Forgets everything."""
        self.store, self.recording, self.unfed, self.ended = None, False, None, None
        self.forget()
        for layer in self.budgeted:
            layer.columns, layer.arrived, layer.waiting = 0, 0, None
            layer.filled, layer.is_initialized = None, False
        for layer in self._stock():
            layer.reset()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the cache to a file in one step, for `load_cache`. Raises `KVPolicyError` where that cannot be."""
        from kvpolicy.integrations.transformers.save import save_cache

        save_cache(self, path)

    # --- accounting

    def seen_mask(self) -> Tensor:
        """int64 [B, columns], 0 where padding came."""
        return torch.ones(1, 0, dtype=torch.int64) if self.store is None else self.budgeted[0].filled_columns().long()

    @property
    def lengths(self) -> Tensor:
        """int64 [L, B, H], entries each KV head holds now."""
        return self._enforced().lengths

    @property
    def capacities(self) -> Tensor:
        """int64 [L, B, H], entries each KV head may hold now."""
        return self._enforced().capacities

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor held, tables and stock layers included."""
        held = 0 if self.store is None else self._enforced().nbytes
        return held + sum(tensor.nbytes for layer in self._stock() for tensor in tensors_of(layer).values())

    def report(self) -> CacheReport:
        """Who was kept, what it weighs, and whether anything was evicted at all."""
        return self._enforced().report()

    def _enforced(self) -> RaggedStore:
        self.check_ended()
        store = self.opened()
        self.check_repeated()
        return store

    def _stock(self) -> list[Any]:
        """Layers that transformers made; the dummies of layers that reuse others' keys and values are none."""
        return [layer for layer in self.layers if not isinstance(layer, BudgetedLayer) and hasattr(layer, "reset")]

    def _crop_store(self, count: int) -> None:
        try:
            self.opened().crop(count)
        except BudgetError as error:
            if self.recording:
                raise
            raise BudgetError(
                f"{error} Assisted generation announces itself to a cache that it is given: call "
                "kvpolicy.generate(model, kvpolicy.new_cache(...), ids, ...) instead of letting attached() supply it"
            ) from None

    def _settle(self) -> None:
        self.check_ended()
        for layer in self.budgeted:
            layer._finish()

    def _take(self, rows: Tensor, on_stock: Callable[[Any], None]) -> None:
        self._settle()
        for layer in self.budgeted:
            layer.filled = None if layer.filled is None else layer.filled[rows.cpu()]
        if self.store is not None:
            self.state.take(rows.long(), self.store.batch_size)
            self.store.take(rows.long())
        for layer in self._stock():
            on_stock(layer)
