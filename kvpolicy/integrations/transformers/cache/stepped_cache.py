"""A cache over which a forward of one token can be a step: planned beforehand, and recorded if there is a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvpolicy.cache.scoring import Scoring
from kvpolicy.cache.store import RaggedStore
from kvpolicy.integrations.transformers.attention.columns import Reading
from kvpolicy.integrations.transformers.cache.budgeted_layer import BudgetedLayer
from kvpolicy.integrations.transformers.cache.forwards import WatchedCache
from kvpolicy.integrations.transformers.cache.model_state import ModelState
from kvpolicy.integrations.transformers.cache.replays import Replays
from kvpolicy.integrations.transformers.cache.sharing_layer import SharingLayer
from kvpolicy.integrations.transformers.cache.step_op import SteppedLayer, handle_of
from kvpolicy.integrations.transformers.cache.window_ring import StepCounts, WindowRing
from kvpolicy.model.spec import ModelSpec


class SteppedCache(WatchedCache):
    """The steps of a `RaggedCache`.

    budgeted: those of its layers that are
    state:    of the model, for the text in this cache
    other_kinds: of layers that a step cannot run over
    rings:    of the layers with a sliding window, while tokens are decoded
    stepping: what a step goes by, while a forward runs that was planned and may be recorded: nothing is counted in
        Python then
    replays: how decoded tokens run: as replays of a CUDA graph, or why not
    is_stepped: whether every token has to be a step, recorded or not: rows are slots, whose windows lie in rings alone
    """

    store: RaggedStore | None

    def __init__(self, spec: ModelSpec, layers: list[Any], state: ModelState, dropped_at: int | None) -> None:
        attends = (i for i, layer in enumerate(spec.layers) if layer.kind != "linear" and layer.shared_with is None)
        super().__init__(layers, max(attends), dropped_at)
        self.spec, self.state = spec, state
        self.budgeted = [layer for layer in layers if isinstance(layer, BudgetedLayer)]
        self.rings = [
            WindowRing(index, self.layers[index], layer.window)
            for index, layer in enumerate(self.spec.layers)
            if layer.kind == "sliding" and layer.window is not None and layer.shared_with is None
        ]
        self._ring_of = {ring.index: place for place, ring in enumerate(self.rings)}
        self._row_of = {layer.model_layer: layer.row for layer in self.budgeted}
        known = {*self._ring_of, *self._row_of}
        self.other_kinds = sorted(
            {
                type(layer).__name__
                for index, layer in enumerate(self.layers)
                if index not in known and self.spec.layers[index].shared_with is None
            }
        )
        self.stepping: StepCounts | None = None
        self._handle, self._stepped = -1, dict[int, SteppedLayer]()
        self.replays = Replays()
        self.is_stepped = False

    def furnish(self, slots: int, dtype: torch.dtype, device: torch.device) -> None:
        """Its rows are so many slots from now on: sliding-window layers lie in rings, and its length says nothing."""
        self.dropped_at = None
        for ring in self.rings:
            layer = self.spec.layers[ring.index]
            ring.furnish((slots, layer.num_kv_heads), (layer.key_dim, layer.value_dim), dtype, device)
        self.is_stepped = bool(self.rings)

    def seat_rings(self, slot: int, other: SteppedCache) -> None:
        """The windows of a cache of one sequence become those of a slot."""
        other.open_rings()
        for ring, own in zip(self.rings, other.rings, strict=True):
            ring.seat(slot, own)

    def opened(self) -> RaggedStore:
        """The store. Raises `ModelError` where there is none yet."""
        raise NotImplementedError

    @property
    def is_decoding(self) -> bool:
        """Whether a prompt is there, and the next token is decoded behind it under the budget."""
        if self.store is None or self.watch is not None or self.offloading or not self.budgeted[-1].columns:
            return False
        self.check_ended()
        return not self.awaits_repeat

    @property
    def stock_layers(self) -> list[Any]:
        """Layers that transformers made; the dummies of layers that reuse others' keys and values are none."""
        ours = BudgetedLayer, SharingLayer
        return [layer for layer in self.layers if not isinstance(layer, ours) and hasattr(layer, "reset")]

    @property
    def layouts(self) -> list[object]:
        """What stays the same as long as entries lie where they lie."""
        return [*self.opened().layouts, *(ring.layout for ring in self.rings)]

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # of torch; what counts tokens is not to be traced
    def replay(self, model: PreTrainedModel, own: Callable[..., Any], call: dict[str, Any]) -> Any:
        """What a forward of the attached model returns, where it is a step; None where its own has to run.

        A model that its caller has compiled takes steps without that: `DecodeRunner` compiles them.
        """
        return self.replays.run(self, model, own, call)

    def open_rings(self) -> None:
        """Gets layers with a sliding window ready for steps."""
        for ring in self.rings:
            ring.open(self.opened().seen)

    def close_rings(self) -> None:
        """Gives these layers back to transformers."""
        if self.store is not None:
            for ring in self.rings:
                ring.close(self.store.seen)

    def run_step(self, forward: Callable[[], Any], counts: StepCounts, reading: Reading) -> Any:
        """A forward of one token that was planned, now. counts: what it goes by;  reading: what its mask says"""
        layers = [layer for layer in self.opened().layers if layer is not None]
        before = [layer.seen for layer in layers]
        try:
            out = self.trace_step(forward, counts)
        except BaseException as error:
            written = [layer.seen is not seen for layer, seen in zip(layers, before, strict=True)]
            if all(written) and not self.rings:  # some of which may come behind them
                self.count_step(reading)
            elif any(written) or self.rings:
                self.break_off(f"a forward broke off with {type(error).__name__}, its token is in some layers only")
            raise
        self.count_step(reading)
        return out

    def trace_step(self, forward: Callable[[], Any], counts: StepCounts) -> Any:
        """The forward of `run_step` for a recording, which is not counted: the device does nothing of it yet."""
        counts.forget()
        handle = handle_of(self, self._handle)
        if handle != self._handle:
            layers = [*self._row_of, *self._ring_of]
            self._handle, self._stepped = handle, {layer: SteppedLayer(handle, layer) for layer in layers}
            for index, layer in enumerate(self.layers):
                if isinstance(layer, SharingLayer):
                    self._stepped[index] = SteppedLayer(handle, layer.owner.model_layer, keeps=False)
        self.stepping = counts
        try:
            return forward()
        finally:
            self.stepping = None

    def pass_step(self, replay: Callable[[], None], reading: Reading) -> None:
        """A token that was planned, by the replay of a graph."""
        try:
            replay()
            self.opened().pass_step()
        except BaseException as error:
            self.break_off(f"a forward broke off with {type(error).__name__}")
            raise
        self.count_step(reading)

    def count_step(self, reading: Reading) -> None:
        """Counts the token of a step. reading: what its mask says"""
        for layer in self.budgeted:
            layer.count_step(reading)
        for ring in self.rings:
            ring.count()

    def step(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring, *, append: bool) -> Tensor:
        """The attention of a step in one layer of the model, which writes the token first if it owns its key."""
        if (place := self._ring_of.get(layer)) is not None:
            ring = self.rings[place]
            assert self.stepping is not None  # this is one of its layers
            if append:
                ring.write(key, value, self.stepping)
            return ring.attend(query, key.shape[1], scoring, self.stepping)
        store, row = self.opened(), self._row_of[layer]
        if not append:
            return store.attend(row, query, scoring)
        store.append(row, key, value)
        return store.attend_newest(row, query, scoring)

    def bookmark(self) -> Callable[[], None]:
        """Returns what takes the counts back to here, from behind a step that was only recorded."""
        store, states = self.opened().bookmark(), [layer.state for layer in self.budgeted]

        def restore() -> None:
            store()
            for layer, state in zip(self.budgeted, states, strict=True):
                layer.resume(state)

        return restore

    def forget(self) -> None:
        super().forget()
        self.state.forget()
        self.replays.forget()
        for ring in self.rings:
            ring.forget()

    # --- what transformers calls on a cache

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """As in transformers; in a step over no columns, since its token sees all that is there."""
        if self.stepping is not None:
            return 0, 0
        sizes: tuple[int, int] = super().get_mask_sizes(query_length, layer_idx)
        return sizes

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """As in transformers; in a step a tensor, as of every cache whose length is not a constant of the code.

        Models ask before they give positions to tokens, so here they get their state back.
        """
        if self.stepping is not None:
            return self.stepping.columns
        self.state.enter()
        return super().get_seq_length(layer_idx)
