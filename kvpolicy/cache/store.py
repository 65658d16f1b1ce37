"""The ragged store: per-head budgets that really free memory, for any decoding loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from kvpolicy_kernels.ragged_attention import ragged_attention
from torch import Tensor

from kvpolicy.cache import schedule as schedules
from kvpolicy.cache.arena import Chunk, LayerArena
from kvpolicy.cache.layer import StoreLayer
from kvpolicy.cache.report import CacheReport, report_of
from kvpolicy.cache.rows import RowTables
from kvpolicy.cache.schedule import Schedule
from kvpolicy.cache.scoring import NotANumber, check_sources, chunk_mask, score_chunk, score_step
from kvpolicy.cache.scoring import Scoring as Scoring
from kvpolicy.cache.select import Protection
from kvpolicy.cache.size import holds_scores
from kvpolicy.cache.split import RuntimeSplit
from kvpolicy.errors import BudgetError
from kvpolicy.interfaces import EvictionPolicy
from kvpolicy.plan import BudgetPlan, policy_of
from kvpolicy.spec import ModelSpec

DecodeMode = Literal["evict", "append"]

GROWTH_INTERVAL = 64
"""Decoded tokens after which a growing budget is apportioned anew."""

ROLLBACK = 64
"""Last tokens that stay above the capacity while they may be taken back (speculative decoding)."""


class RaggedStore:
    """Keys and values of every budgeted layer, a segment per (sequence, KV head).

    spec:       the model's layers and heads
    schedule:   capacities over the tokens seen (`kvpolicy.cache.schedule`)
    policy:     who is evicted
    protected:  [begin, end) positions that are never evicted, on top of the capacity
    decode:     "evict" holds the capacity at every step; "append" keeps decoded tokens until the next longer forward
    split:      run-time allocation instead of the schedule's own shares
    heads:      (first, count) of the KV heads held here, under tensor parallelism
    supplied:   sources that a store has not by itself and the caller hands in with each forward

    Raises `PluginError` when the policy requires a source that it cannot be given, `BudgetError` for a schedule of
    another model.
    """

    def __init__(
        self,
        spec: ModelSpec,
        schedule: Schedule,
        policy: EvictionPolicy,
        *,
        batch_size: int = 1,
        protected: Sequence[Sequence[int]] = (),
        decode: DecodeMode = "evict",
        split: RuntimeSplit | None = None,
        heads: tuple[int, int] | None = None,
        supplied: frozenset[str] = frozenset(),
    ) -> None:
        check_sources(policy, supplied)
        if schedule.shape != spec.table_shape:
            raise BudgetError(
                f"the budget is for (layers, KV heads) = {schedule.shape}, the model has {spec.table_shape}"
            )
        if decode not in get_args(DecodeMode):
            raise BudgetError(f"decode must be 'evict' or 'append', got {decode!r}")
        first, count = (0, spec.num_kv_heads) if heads is None else heads
        if not 0 <= first < first + count <= spec.num_kv_heads:
            raise BudgetError(f"heads must be (first, count) of the model's {spec.num_kv_heads} KV heads, got {heads}")
        if split is not None and heads is not None:
            raise BudgetError(
                f"{type(split.allocator).__name__} splits the budget at run time by comparing all KV heads, of which a "
                "tensor-parallel rank holds a part only: use a plan, or an allocator with fixed shares"
            )
        floor = policy.num_sink_tokens + 1
        self.spec, self.policy, self.batch_size, self.decode_mode = spec, policy, batch_size, decode
        self.split = None if split is None else split.with_floor(floor)
        self.schedule = schedule if split is not None else schedule.with_floor(floor)
        self.protection = Protection.of(policy.num_sink_tokens, policy.recent_window, protected)
        self.first_head, self.num_heads = first, count
        self.rows = RowTables(self.schedule, self.split, batch_size)
        self.layers: list[StoreLayer | None] = [None] * spec.num_budgeted_layers
        self._wrong = NotANumber()

    @classmethod
    def from_plan(
        cls,
        plan: BudgetPlan,
        *,
        retention: float | None = None,
        tokens: int | None = None,
        context_length: int | None = None,
        min_tokens: int = schedules.MIN_TOKENS,
        batch_size: int = 1,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        spec: ModelSpec | None = None,
        protected: Sequence[Sequence[int]] = (),
        decode: DecodeMode = "evict",
    ) -> RaggedStore:
        """An empty store under a plan.

        retention: kept fraction of the tokens seen; None means the plan's level if it has just one
        tokens:    instead, mean entries per KV head; with `context_length`, capacities are fixed up front
        spec:      the model's; None means plain attention of the plan's shape

        Raises `PlanError` and `BudgetError` as `BudgetPlan.capacities` does.
        """
        if spec is None:
            spec = plan.model.to_spec()
        else:
            plan.check_model(spec)
        schedule = schedules.from_plan(
            plan, retention=retention, tokens=tokens, context_length=context_length, min_tokens=min_tokens
        )
        store = cls(spec, schedule, policy_of(plan), batch_size=batch_size, protected=protected, decode=decode)
        for layer in range(spec.num_budgeted_layers):
            store._make(layer, dtype, torch.empty(0, device=device).device)
        return store

    # --- what a decoding loop calls

    def prefill(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        num_padding: Tensor | Sequence[int] | None = None,
        *,
        scale: float | None = None,
        sink_logits: Tensor | None = None,
    ) -> Tensor:
        """Attends over what is held and over these tokens, then keeps each KV head's part.

        query: [B, num_q_heads, n, D];  key, value: [B, H, n, dim], keys after RoPE
        num_padding: [B], tokens at the start of each row that are padding
        scale, sink_logits: [num_q_heads]; what the layer's `LayerSpec` cannot know. Softcap is the spec's.

        Returns [B, num_q_heads, n, Dv]. Within one call, tokens see the store as it was before its evictions.
        """
        valid = None
        if num_padding is not None:
            padding = torch.as_tensor(num_padding).cpu()
            if padding.shape != (self.batch_size,):
                raise BudgetError(
                    f"num_padding must be [{self.batch_size}], one for each row, got {list(padding.shape)}"
                )
            valid = torch.arange(key.shape[2])[None] >= padding[:, None]
        scoring = self._scoring(scale, sink_logits)
        chunk = self.arrive(layer, key, value, valid)
        out = self.attend_chunk(layer, query, chunk, scoring)
        self.keep(layer, query, chunk, scoring)
        return out

    def decode(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None = None,
        sink_logits: Tensor | None = None,
    ) -> Tensor:
        """One token: evicts where a KV head is at its capacity, writes the token, attends over what is held then.

        Shapes as in `prefill` with n = 1.
        """
        if not self.can_append(layer):
            return self.prefill(layer, query, key, value, scale=scale, sink_logits=sink_logits)
        scoring = self._scoring(scale, sink_logits)
        self.append(layer, key, value)
        out = self.attend(layer, query, scoring)
        self.rescore(layer, query, scoring)
        return out

    # --- its parts, for callers that compute the attention of a prompt themselves

    def can_append(self, layer: int) -> bool:
        """Whether a single token can be appended; else it goes the way of a longer chunk."""
        held = self.layers[layer]
        return held is not None and held.pending is None and bool(held.seen.any())

    def is_empty(self, layer: int) -> bool:
        """Whether a layer holds nothing at all."""
        held = self.layers[layer]
        return held is None or (held.pending is None and not held.arena.width)

    def positions(self, layer: int) -> list[Tensor]:
        """int64 [length] of each (sequence, KV head): the positions of its entries, in no order."""
        arena = self._layer(layer).arena
        parts = zip(arena.start.tolist(), arena.length.tolist(), strict=True)
        return [arena.positions[start : start + length].long() for start, length in parts]

    def append(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Writes one token into every segment. key, value: [B, H, 1, dim]."""
        held = self._open(layer, key, value)
        if key.shape[2] != 1 or not self.can_append(layer):
            raise BudgetError(
                f"append takes one token where tokens are held and none is pending, got {key.shape[2]} for layer "
                f"{layer}; prefill, or arrive and keep, take the others"
            )
        held.decoded += 1
        if held.decoded % GROWTH_INTERVAL == 0:
            self._grow(layer, held, held.seen + 1)
        held.append(key, value, self.policy.new_entry_score, evict=self.decode_mode == "evict")

    def attend(self, layer: int, query: Tensor, scoring: Scoring) -> Tensor:
        """query: [B, num_q_heads, n, D], which see every entry held. Returns [B, num_q_heads, n, Dv]."""
        arena = self._layer(layer).arena
        return ragged_attention(query, arena.keys, arena.values, arena.start, arena.length, **scoring.options())

    def rescore(self, layer: int, query: Tensor, scoring: Scoring) -> None:
        """Hands the entries to the policy after a decoding step, if it looks at them at all."""
        score_step(self.policy, layer, self._layer(layer).arena, query, scoring.options(), self._wrong)
        if layer == len(self.layers) - 1:  # once a token, since that waits for the device
            self._wrong.check(self.policy, "score_step")

    def arrive(self, layer: int, key: Tensor, value: Tensor, valid: Tensor | None = None) -> Chunk:
        """Counts new tokens and returns them behind those still pending.

        key, value: [B, H, n, dim];  valid: bool [B, n], False for padding
        """
        held, expected = self._open(layer, key, value), (self.batch_size, key.shape[2])
        if not key.shape[2] or (valid is not None and valid.shape != expected):
            came = None if valid is None else list(valid.shape)
            raise BudgetError(
                f"expected at least one token and valid={list(expected)} or None, got {key.shape[2]} and {came}"
            )
        return held.arrive(key, value, None if valid is None else valid.cpu())

    def attend_chunk(
        self,
        layer: int,
        query: Tensor,
        chunk: Chunk,
        scoring: Scoring,
        mask: Tensor | None = None,
        entry_mask: list[Tensor] | None = None,
    ) -> Tensor:
        """Attends over the entries held and the chunk. query: [B, num_q_heads, n, D], the chunk's last n tokens.

        mask:       bool [B or 1, 1, n, len(chunk)]; None means causal, padding excluded
        entry_mask: bool [n, length] for each segment; None means that every entry is visible
        """
        arena = self._layer(layer).arena
        if mask is None and bool((chunk.positions < 0).any()):
            mask = chunk_mask(chunk, query.shape[2])
        return ragged_attention(
            query,
            arena.keys,
            arena.values,
            arena.start,
            arena.length,
            chunk_key=chunk.key,
            chunk_value=chunk.value,
            chunk_mask=mask,
            entry_mask=entry_mask,
            **scoring.options(),
        )

    def keep(
        self,
        layer: int,
        query: Tensor,
        chunk: Chunk,
        scoring: Scoring,
        *,
        hold: int = 0,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Takes what the policy keeps of [entries held ; chunk] and gives up the rest.

        query: [B, num_q_heads, n, D] of the chunk's last n tokens
        hold:  last tokens that stay pending, so that they can be taken back
        extra: sources that the caller supplies, by name
        """
        held, settling = self._layer(layer), max(0, len(chunk) - hold)
        held.pending = chunk.part(slice(settling, None)).owned() if hold and len(chunk) else None
        if not settling:
            return
        held.decoded, scores = 0, None
        if held.arena.scores is not None:
            scores = score_chunk(self.policy, layer, held.arena, query, chunk, scoring.options(), extra or {})
            scores = scores[:, : held.arena.width + settling]
            self._wrong.add(scores)
            if self.split is not None or layer == len(self.layers) - 1:  # else nobody waits for the device here
                self._wrong.check(self.policy, "score_prompt")
        settled = chunk.part(slice(0, settling))
        if self.split is None or scores is None:
            self._grow(layer, held, held.settled)
        else:
            self.split_layer(layer, held, settled, scores)
        held.fold(settled, scores)

    # --- what becomes of a batch

    def take(self, rows: Tensor) -> None:
        """Keeps these sequences, in this order and as often as they stand there. rows: int64 [B']."""
        rows = rows.cpu()
        if not len(rows) or int(rows.min()) < 0 or int(rows.max()) >= self.batch_size:
            raise BudgetError(f"take expects rows from 0 to {self.batch_size - 1}, got {rows.tolist()}")
        for held in self._opened():
            held.take(rows)
        self.rows.take(rows.tolist())
        self.batch_size = len(rows)

    def crop(self, count: int) -> None:
        """Takes back the last `count` tokens of every sequence.

        Columns, as they came: a column of pending tokens that was padding takes nothing from its row.
        Raises `BudgetError`, before anything is changed, where an entry was evicted since: it would be missing.
        Where no entry was, scores stay as the tokens taken back have left them.
        """
        if count < 0:
            raise BudgetError(f"crop takes the number of tokens to take back, got {count}")
        for held in self._opened():
            held.check_crop(count)
        for held in self._opened():
            held.crop(count)

    # --- accounting

    @property
    def seen(self) -> Tensor:
        """int64 [B], tokens of each sequence so far, padding excluded."""
        for held in self._opened():
            return held.seen
        return torch.zeros(self.batch_size, dtype=torch.int64)

    @property
    def lengths(self) -> Tensor:
        """int64 [L, B, H], entries held now; pending tokens included."""
        return self._tabulate(lambda held: held.num_held)

    @property
    def capacities(self) -> Tensor:
        """int64 [L, B, H], entries allowed now, protected spans included; `UNLIMITED` where nothing is evicted."""
        return self._tabulate(lambda held: held.capacity)

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor held, tables included; memory that several tensors share counts once."""
        held = [tensor for layer in self._opened() for tensor in layer.tensors.values()] + self.rows.tensors
        storages = {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in held)}
        return sum(storages.values())

    @property
    def dense_nbytes(self) -> int:
        """Bytes that keeping every token seen would take, padding excluded."""
        itemsize = next((held.arena.keys.element_size() for held in self._opened()), 0)
        return int(self.seen.sum()) * self.spec.num_budgeted_layers * self.num_heads * self.spec.entry_bytes(itemsize)

    def report(self) -> CacheReport:
        """What was kept, what it weighs, and whether anything was evicted at all."""
        return report_of(self)

    # --- inside

    def _opened(self) -> list[StoreLayer]:
        return [held for held in self.layers if held is not None]

    def _make(self, layer: int, dtype: torch.dtype, device: torch.device) -> StoreLayer:
        shape = self.spec.attention
        arena = LayerArena(
            self.batch_size * self.num_heads,
            shape.key_dim,
            shape.value_dim,
            dtype,
            device,
            num_pinned=self.protection.num_pinned,
            scored=self.schedule.evicts and holds_scores(self.policy, self.split),
        )
        held = self.layers[layer] = StoreLayer(arena, self.batch_size, self.num_heads, self.protection)
        return held

    def _open(self, layer: int, key: Tensor, value: Tensor) -> StoreLayer:
        """The layer that these new tokens belong to, made if they are the first."""
        shape = self.spec.attention
        sizes = [(self.batch_size, self.num_heads, key.shape[2], dim) for dim in (shape.key_dim, shape.value_dim)]
        if [key.shape, value.shape] != sizes:
            raise BudgetError(
                f"this store holds {self.batch_size} sequences of {self.num_heads} KV heads: expected keys and values "
                f"of shape {sizes[0]} and {sizes[1]}, got {tuple(key.shape)} and {tuple(value.shape)}"
            )
        held = self.layers[layer] or self._make(layer, key.dtype, key.device)
        own = held.arena.keys.dtype, held.arena.device
        for came in (key, value):
            if (came.dtype, came.device) != own:
                raise BudgetError(
                    f"layer {layer} of this store holds {own[0]} on {own[1]}, got {came.dtype} on {came.device}"
                )
        return held

    def _layer(self, layer: int) -> StoreLayer:
        held = self.layers[layer]
        if held is None:
            raise BudgetError(f"layer {layer} of this store is empty: its prompt comes first")
        return held

    def _scoring(self, scale: float | None, sink_logits: Tensor | None) -> Scoring:
        shape = self.spec.attention
        if shape.sinks and sink_logits is None:
            raise BudgetError(f"model type '{self.spec.model_type}' has learned sinks: give sink_logits [num_q_heads]")
        return Scoring(shape.scale if scale is None else scale, shape.softcap, sink_logits)

    def _grow(self, layer: int, held: StoreLayer, seen: Tensor) -> None:
        """Brings a layer's capacities up to the tokens seen. seen: int64 [B]."""
        self.rows.grow(seen.tolist())
        held.table = self._heads(self.rows.layer(layer))

    def split_layer(
        self, layer: int, held: StoreLayer, chunk: Chunk | None = None, scores: Tensor | None = None
    ) -> None:
        """Run-time capacities of this layer, and of earlier ones that shrink for it.

        chunk, scores: float32 [S, width + n], of tokens that come in now; None splits by what is held
        """
        assert self.split is not None
        earlier = [self._layer(index) for index in range(layer)]
        device = held.arena.device  # layers may lie on several
        compared = [held.compared(scores, chunk)]
        if not self.split.split_is_per_layer:
            compared = [*(each.compared().to(device) for each in earlier), *compared]
        tables = self.rows.split_layer(layer, compared, held.settled.tolist())
        for each, table in zip((*earlier, held), tables, strict=True):
            each.table = table
        for each in earlier:
            each.shrink()

    def _heads(self, table: Tensor) -> Tensor:
        """The part of [B, all KV heads] that is held here, in memory of its own."""
        return table[:, self.first_head : self.first_head + self.num_heads].clone()

    def _tabulate(self, of: Callable[[StoreLayer], Tensor]) -> Tensor:
        shape = (self.batch_size, self.num_heads)
        empty = torch.zeros(shape, dtype=torch.int64)
        return torch.stack([empty if held is None else of(held).view(shape) for held in self.layers])
