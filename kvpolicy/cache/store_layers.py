"""The layers of a store: made when their first tokens come, and asked for in their turn."""

from __future__ import annotations

from typing import Any, Literal

import torch
from kvpolicy_kernels.attention import plan_work
from kvpolicy_kernels.key_centre import KeyCentre
from torch import Tensor

from kvpolicy.budget.entry_format import Format, least_entries, of_layer
from kvpolicy.cache import inputs
from kvpolicy.cache.accounts import Accounts
from kvpolicy.cache.arena import LayerArena
from kvpolicy.cache.device_tables import on_device
from kvpolicy.cache.encoded_arena import EncodedArena
from kvpolicy.cache.inputs import Finiteness
from kvpolicy.cache.layer import StoreLayer
from kvpolicy.cache.scoring import Scoring, scores_stay
from kvpolicy.cache.select import Protection
from kvpolicy.cache.size import holds_scores
from kvpolicy.cache.thin_arena import ThinArena
from kvpolicy.errors import BudgetError
from kvpolicy.model.layer_spec import LayerSpec
from kvpolicy.plugins.roles import EvictionPolicy

DecodeMode = Literal["evict", "append"]


class Layers(Accounts):
    """The layers of a `RaggedStore`, and what is checked before one of them is used.

    first_head: the first of the KV heads held here
    key_centres: of each layer that of the KV heads held here, or None
    """

    policy: EvictionPolicy
    decode_mode: DecodeMode
    entry_format: Format
    protection: Protection
    first_head: int
    key_centres: list[KeyCentre | None]
    _shape: LayerSpec
    _num_q_heads: int
    _finite: Finiteness

    def set_key_centre(self, layer: int, key_centre: KeyCentre | None) -> None:
        """What the keys of a layer that is not open yet are less of, in place of what the store was made with."""
        self.key_centres[layer] = key_centre

    def open(self, layer: int, dtype: torch.dtype, device: torch.device) -> StoreLayer:
        """A layer that holds nothing yet."""
        entries = self.layers[layer] = StoreLayer(
            layer,
            self._arena(layer, dtype, device),
            self.batch_size,
            self.num_heads,
            self.protection,
            scores_stay=scores_stay(self.policy),
        )
        return entries

    @property
    def least_capacity(self) -> int:
        """The fewest entries that a KV head may be given."""
        return least_entries(self.policy, self.entry_format)

    def _arena(self, layer: int, dtype: torch.dtype, device: torch.device) -> LayerArena:
        shape, batch, heads = self._shape, self.batch_size, self.num_heads
        entry_format = of_layer(self.entry_format, layer)
        num_pinned = self.protection.num_pinned
        scored = self.schedule.evicts and holds_scores(self.policy, self.split)
        if entry_format is None:
            dims = shape.key_dim, shape.value_dim
            return LayerArena(batch * heads, *dims, dtype, device, num_pinned=num_pinned, scored=scored)
        num_sinks, segments = self.policy.num_sink_tokens, (batch, heads)
        kept: dict[str, Any] = {
            "entry_format": entry_format,
            "num_sinks": num_sinks,
            "num_pinned": num_pinned,
            "scored": scored,
        }
        if entry_format.bits == 16:
            return ThinArena(segments, shape, dtype, device, **kept)
        centre = self.key_centres[layer]
        centre = None if centre is None else centre.to(device)
        return EncodedArena(segments, shape, dtype, device, **kept, key_centre=centre)

    def _bring_tables(self) -> None:
        """Has what ops look up of entries on the device for all layers at once, where a chunk comes behind some."""
        arenas = [layer.arena for layer in self._opened()]
        device = arenas[0].device
        if len(arenas) < len(self.layers) or not arenas[0].width or {arena.device for arena in arenas} != {device}:
            return  # each by itself
        tables = on_device(torch.stack([torch.stack([x.start, x.length]) for x in arenas], 1), device)
        work, first = None, arenas[0]
        if device.type == "cuda":
            work = plan_work(tables[1], head_dim=first.head_dim, num_programs=first.num_programs)
        for index, arena in enumerate(arenas):
            arena.bring(tables[:, index], None if work is None else work.layer(index))

    def _open(self, layer: int, key: Tensor, value: Tensor) -> StoreLayer:
        """The layer that these new tokens belong to, made if they are the first."""
        layer = inputs.layer_index(layer, len(self.layers))
        inputs.check_entries(key, value, self.batch_size, self.num_heads, self._shape)
        entries = self.layers[layer] or self.open(layer, key.dtype, key.device)
        inputs.check_agreement(layer, entries.arena.like, key, value)
        return entries

    def _check_tokens(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Before the layer is made: its first tokens decide on its dtype and its device."""
        inputs.layer_index(layer, len(self.layers))
        inputs.check_entries(key, value, self.batch_size, self.num_heads, self._shape)
        inputs.check_query(query, key, self.batch_size, self._num_q_heads, key.shape[2])

    def _check_turn(self, layer: int, after: Tensor) -> None:
        """after: int64 [B], the tokens that the layer will have seen."""
        other = layer - 1 if layer else len(self.layers) - 1
        inputs.check_turn(layer, self._seen(layer), after, other, self._seen(other))

    def _seen(self, layer: int) -> Tensor:
        """int64 [B]."""
        entries = self._entries(layer)
        return torch.zeros(self.batch_size, dtype=torch.int64) if entries is None else entries.seen

    def _entries(self, layer: int) -> StoreLayer | None:
        return self.layers[inputs.layer_index(layer, len(self.layers))]

    def _layer(self, layer: int) -> StoreLayer:
        entries = self._entries(layer)
        if entries is None:
            raise BudgetError(f"layer {layer} of this store is empty: its prompt comes first")
        return entries

    def _scoring(self, scale: float | None, sink_logits: Tensor | None) -> Scoring:
        return inputs.scoring_of(self._shape, self.spec.model_type, self._num_q_heads, scale, sink_logits)

    def _grow(self, layer: StoreLayer, seen: Tensor) -> None:
        """Brings a layer's capacities up to the tokens seen. seen: int64 [B]."""
        self.rows.grow(seen.tolist())
        layer.allow(self._heads(self.rows.layer(layer.index)))

    def _heads(self, table: Tensor) -> Tensor:
        """The part of [B, all KV heads] that is held here, in memory of its own."""
        return table[:, self.first_head : self.first_head + self.num_heads].clone()
