"""The transformers cache over a ragged store.

A budgeted layer answers `update` with the new keys and values alone, marked; its attention function then attends over
the store and lets it keep its part. All other layers are the stock ones. Masks and positions follow the tokens seen,
never the entries kept.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvpolicy.cache.copies import copy_with
from kvpolicy.cache.lower import lower
from kvpolicy.cache.store import RaggedStore
from kvpolicy.errors import BudgetError, ModelError
from kvpolicy.integrations.transformers.attention.tracing import untraced
from kvpolicy.integrations.transformers.cache.budgeted_layer import BudgetedLayer
from kvpolicy.integrations.transformers.cache.layer_state import LayerState, Waiting
from kvpolicy.integrations.transformers.cache.model_state import ModelState
from kvpolicy.integrations.transformers.cache.other_layers import copied, copied_layer, refill, tensors_of
from kvpolicy.integrations.transformers.cache.replays import Replays
from kvpolicy.integrations.transformers.cache.save import save_cache
from kvpolicy.integrations.transformers.cache.sharing_layer import SharingLayer
from kvpolicy.integrations.transformers.cache.stepped_cache import SteppedCache
from kvpolicy.model.spec import ModelSpec

if TYPE_CHECKING:
    from kvpolicy.cache.report import CacheReport
    from kvpolicy.integrations.transformers.cache.recipe import Recipe

StoreFactory = Callable[[int, int], RaggedStore]
"""Makes the store once the batch size and the number of KV heads held here are known."""


class RaggedCache(SteppedCache):
    """A transformers cache whose full-attention layers keep what their budget allows; see `new_cache`.

    spec:         the model's layers and heads
    make_store:   makes the store when the first tokens come
    stock_layers: what a stock cache holds, one for each model layer (layers that reuse others' may be missing)
    attached:     tells whether the model still is
    recipe:       what the cache was made from
    state:        of the model, for the text in this cache
    repeats:      whether the context has to be repeated (`repeat_context`) before the budget can be enforced
    dropped_at:   as in `WatchedCache`

    watch: takes the tokens of a forward instead of the store, while the context is repeated
    recording: whether the last `rollback` tokens are kept on top of the entries, since they may be taken back
    rollback: how many these are; 0 while none is
    is_holding: whether `hold` asked for it: drafts are not expected then
    unfed: tokens [B, k] that the last turn generated and nobody has fed; `kvpolicy.generate` does
    ended: why no further turn can follow, or None
    """

    def __init__(
        self,
        spec: ModelSpec,
        make_store: StoreFactory,
        stock_layers: list[Any],
        attached: Callable[[], bool],
        recipe: Recipe,
        state: ModelState,
        *,
        repeats: bool,
        dropped_at: int | None,
    ) -> None:
        layers = list(stock_layers)
        for row, index in enumerate(spec.budgeted_layers):
            followers = sum(layer.shared_with == index for layer in spec.layers)
            layers[index] = BudgetedLayer(self, row, index, followers)
        for index in recipe.shared_layers:  # a layer that its model has share is never asked
            owner = spec.layers[index].shared_with
            assert owner is not None  # `ModelSpec.sharing` has seen to it
            layers[index] = SharingLayer(layers[owner])
        super().__init__(spec, layers, state, dropped_at)
        self.make_store, self.attached, self.recipe, self.repeats = make_store, attached, recipe, repeats
        self.store: RaggedStore | None = None
        self.watch: Callable[[int, Waiting], None] | None = None
        self.recording, self.is_holding, self.rollback = False, False, 0
        self._fresh = [copied(vars(layer)) for layer in self.stock_layers]
        self.unfed: Tensor | None = None
        self.ended: str | None = None

    def begin(self, key: Tensor) -> None:
        """Makes the store when the first keys come. key: [B, H, n, D]."""
        if self.store is None:
            self.store = self.make_store(int(key.shape[0]), int(key.shape[1]))

    def check_enforced(self) -> None:
        """Raises `ModelError` where keys and values came to a layer, but not their attention."""
        for layer in self.budgeted:
            layer.check_enforced()

    def check_ended(self) -> None:
        self.check_enforced()
        super().check_ended()

    def settle(self) -> None:
        """Keeps what still waits for layers that may read it. Raises `ModelError` in the middle of a forward."""
        self.check_ended()
        for layer in self.budgeted:
            layer.finish()

    @property
    def awaits_repeat(self) -> bool:
        """Whether every token is still held, until `repeat_context` has shown which entries the budget is for."""
        # until the repetition ends, tokens are pending and no arena holds an entry; the last layer is filled last
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

    # --- what others have it do, since what it is made of is its own

    def hold(self, count: int) -> None:
        """Keeps what comes on top of the capacities, unscored, as long as it is among the last `count` tokens."""
        self.recording, self.is_holding, self.rollback = True, count > 0, count

    @contextmanager
    def peek(self, watch: Callable[[int, Waiting], None]) -> Iterator[None]:
        """Within the context a forward attends to what is here and leaves nothing behind, on an error neither.

        watch: is handed the new tokens of each layer, by index among the budgeted layers, in the store's place
        """
        self.close_rings()
        store, layers, others = self.opened(), self.budgeted, self.stock_layers
        states, attributes = [layer.state for layer in layers], [copied(vars(layer)) for layer in others]
        self.watch = watch
        try:
            yield
            for layer in layers:  # what waits for followers is handed over, too
                layer.finish()
            self.check_enforced()
        finally:
            self.watch = None
            store.withdraw()
            for layer, state in zip(layers, states, strict=True):
                layer.resume(state)
            for layer, before in zip(others, attributes, strict=True):
                refill(layer, before)

    def fork(self) -> RaggedCache:
        """A copy that goes its own way: a document is compressed once, and each question continues a copy.

        Entries are copied, nothing else of any size. Raises `ModelError` in the middle of a forward.
        """
        self.settle()  # what waits for its followers is kept once, not by both
        self.close_rings()
        other = copy_with(
            self,
            store=None if self.store is None else self.store.fork(),
            state=self.state.fork(),
            replays=Replays(),
            _touched=set(self._touched),
        )
        other._own(self.layers)
        return other

    def rebudget(self, capacities: Tensor) -> None:
        """Other capacities from now on: evicts down to them, by the scores that the entries have.

        capacities: int64 [L, H], fixed whatever comes; larger ones bring nothing back that was evicted

        With `fork`, several budgets are tried behind one prompt. Raises `BudgetError` for a table of another shape or
        below the policy's fewest entries, and where entries have no scores since nothing was ever to be evicted;
        `ModelError` for an empty cache, and in the middle of a forward.
        """
        self.settle()
        store = self._enforced()
        if not (store.schedule.evicts or store.policy.window_rule):
            raise BudgetError(
                f"this cache was to keep everything, so {type(store.policy).__name__} has scored nothing: make it with "
                "retention= below 1"
            )
        lower(store, capacities)

    def end_turn(self, unfed: Tensor | None, ended: str | None) -> None:
        """Notes what the next turn feeds first, int64 [B, k], or why none can follow."""
        self.unfed, self.ended = unfed, ended

    def resume(
        self, store: RaggedStore, state: LayerState, *, recording: bool, unfed: Tensor | None, ended: str | None
    ) -> None:
        """Goes on with a store that was saved. state: of each layer."""
        self.store, self.recording, self.rollback = store, recording, self.recipe.rollback if recording else 0
        for layer in self.budgeted:
            layer.resume(state)
            layer.lazy_initialization(torch.empty(0), torch.empty(0))
        self.end_turn(unfed, ended)

    # --- what transformers calls on a cache

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """As in transformers. Raises `ModelError` for a model that is not attached, and for a cache that offloads."""
        if self.stepping is not None:  # a compiler may look on
            return self._stepped[layer_idx].update(key_states), value_states
        return self._update(key_states, value_states, layer_idx, *args, **kwargs)

    @untraced
    def _update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.close_rings()
        if layer_idx == self.budgeted[0].model_layer and not self.attached():  # asked once a forward
            raise ModelError("the model is not attached (any more): kvpolicy.attach(model) before its cache is used")
        if self.offloading:
            raise ModelError("this cache cannot be offloaded: attention reads its entries after update() has returned")
        if key_states.shape[2] == 1 and self.budgeted[-1].columns:  # not a prompt of one token
            self.check_repeated()
        self.state.leave()
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def activate_past_recording(self) -> None:
        """Assisted generation begins: as many last tokens as the recipe says can be taken back from now on."""
        self.check_repeated()
        self.close_rings()
        self.recording, self.is_holding, self.rollback = True, False, self.recipe.rollback
        for layer in self.stock_layers:
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()

    def stop_recording(self) -> None:
        """Ends what `activate_past_recording` began; transformers never does."""
        self.recording, self.is_holding, self.rollback = False, False, 0
        for layer in self.stock_layers:  # no ring is open while it records
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
        self.settle()
        self.close_rings()
        if self.store is not None and count:  # first: where it refuses, nothing has changed
            self._crop_store(-count)
        for layer in self.budgeted:
            layer.take_back(-count)
        for layer in self.stock_layers:
            layer.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: row i becomes what row `beam_idx[i]` was, capacities included."""
        rings = {id(ring.layer): ring for ring in self.rings if ring.entries is not None}
        if self.store is None or len(beam_idx) != self.store.batch_size:
            self.close_rings()
            rings = {}
        self._take(beam_idx, lambda layer: rings.get(id(layer), layer).reorder_cache(beam_idx))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows. indices: int64 [B'], or bool [B]."""
        self.close_rings()
        rows = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
        self._take(rows, lambda layer: getattr(layer, "batch_select_indices", layer.reorder_cache)(rows))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row `repeats` times."""
        batch = 1 if self.store is None else self.store.batch_size
        self.batch_select_indices(torch.arange(batch).repeat_interleave(repeats))

    def reset(self) -> None:
        """Forgets everything."""
        self.store, self.recording, self.is_holding, self.rollback = None, False, False, 0
        self.end_turn(None, None)
        self.forget()
        for layer in self.budgeted:
            layer.reset()
        for layer, fresh in zip(self.stock_layers, self._fresh, strict=True):
            refill(layer, copied(fresh))  # their own `reset` leaves entries behind that the next text would see

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the cache to a file in one step, for `load_cache`. Raises `KVPolicyError` where that cannot be."""
        self.close_rings()
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
        own = 0 if self.store is None else self._enforced().nbytes
        rings = sum(ring.nbytes for ring in self.rings)
        return own + rings + sum(x.nbytes for layer in self.stock_layers for x in tensors_of(layer).values())

    def report(self) -> CacheReport:
        """Who was kept, what it weighs, and whether anything was evicted at all."""
        return self._enforced().report()

    def _enforced(self) -> RaggedStore:
        self.check_ended()
        store = self.opened()
        self.check_repeated()
        return store

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

    def _own(self, layers: Sequence[Any]) -> None:
        """Takes copies of another cache's layers for its own."""
        copies: list[Any] = []
        for layer in layers:
            if isinstance(layer, SharingLayer):
                copies.append(SharingLayer(copies[layer.owner.model_layer]))
            else:
                copies.append(layer.fork(self) if isinstance(layer, BudgetedLayer) else copied_layer(layer))
        self.layers, self.budgeted = copies, [layer for layer in copies if isinstance(layer, BudgetedLayer)]
        self.rings = [ring.over(copies[ring.index]) for ring in self.rings]

    def _take(self, rows: Tensor, on_stock: Callable[[Any], None]) -> None:
        self.settle()
        for layer in self.budgeted:
            layer.take(rows)
        if self.store is not None:
            self.state.take(rows.long(), self.store.batch_size)  # before the store's batch is another
            self.store.take(rows.long())
        for layer in self.stock_layers:
            on_stock(layer)
