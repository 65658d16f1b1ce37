"""The ragged store: per-head budgets that really free memory, for any decoding loop."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
from kvpolicy_kernels.attention import ragged_attention
from kvpolicy_kernels.key_centre import KeyCentre
from torch import Tensor

from kvpolicy.budget.ask import Ask
from kvpolicy.budget.entry_format import Format, check_format, check_queries, exact_recent, format_of, least_entries
from kvpolicy.budget.plan import BudgetPlan, policy_of
from kvpolicy.budget.plan_parts import positive
from kvpolicy.cache import inputs
from kvpolicy.cache import schedule as schedules
from kvpolicy.cache.attention_mass import chunk_mask
from kvpolicy.cache.attention_statistics import attention_statistics
from kvpolicy.cache.chunk import Arrival, Chunk
from kvpolicy.cache.copies import copy_with
from kvpolicy.cache.first_token import FirstToken
from kvpolicy.cache.inputs import Finiteness
from kvpolicy.cache.layer import StoreLayer
from kvpolicy.cache.report import CacheReport, report_of
from kvpolicy.cache.rows import RowTables, split_layers
from kvpolicy.cache.schedule import Schedule
from kvpolicy.cache.scoring import NotANumber, check_sources, score_chunk
from kvpolicy.cache.scoring import Scoring as Scoring
from kvpolicy.cache.select import Protection
from kvpolicy.cache.split import RuntimeSplit
from kvpolicy.cache.step import PlannedStep, StepTables
from kvpolicy.cache.store_decoding import Decoding
from kvpolicy.cache.store_layers import DecodeMode as DecodeMode
from kvpolicy.defaults import MIN_TOKENS
from kvpolicy.errors import BudgetError
from kvpolicy.model.spec import ModelSpec
from kvpolicy.plugins.roles import EvictionPolicy

ROLLBACK = 64
"""Last tokens that stay above the capacity while they may be taken back (speculative decoding)."""


class RaggedStore(Decoding):
    """Keys and values of every budgeted layer, a segment per (sequence, KV head).

    spec:       the model's layers and heads
    schedule:   capacities over the tokens seen (`kvpolicy.cache.schedule`)
    policy:     who is evicted
    protected:  [begin, end) positions that are never evicted, on top of the capacity
    decode:     "evict" holds the capacity at every step; "append" keeps decoded tokens until the next longer forward
    split:      run-time allocation instead of the schedule's own shares
    heads:      (first, count) of the KV heads held here, under tensor parallelism
    supplied:   sources that a store has not by itself and the caller hands in with each forward
    entry_format: in which keys and values are kept, one for all layers or one for each; None for the dtype in which
        they come
    key_centres: of each budgeted layer what the keys of the KV heads held here lie around, or None; a format that is
        centred encodes keys less of it. None for a model without

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
        entry_format: Format = None,
        key_centres: Sequence[KeyCentre | None] | None = None,
    ) -> None:
        check_sources(policy, supplied, None if split is None else split.allocator)
        if schedule.shape != spec.table_shape:
            raise BudgetError(
                f"the budget is for (layers, KV heads) = {schedule.shape}, the model has {spec.table_shape}"
            )
        if decode not in get_args(DecodeMode):
            raise BudgetError(f"decode must be 'evict' or 'append', got {decode!r}")
        first, count = inputs.local_heads(heads, spec.num_kv_heads)
        if split is not None and heads is not None:
            raise BudgetError(
                f"{type(split.allocator).__name__} splits the budget at run time by comparing all KV heads, of which a "
                "tensor-parallel rank holds a part only: use a plan, or an allocator with fixed shares"
            )
        check_format(entry_format, spec)
        check_queries(policy, entry_format)
        self.spec, self.policy, self.decode_mode, self.entry_format = spec, policy, decode, entry_format
        floor = self.least_capacity
        self.batch_size = positive("batch_size", batch_size)
        split = None if split is None else split.with_floor(floor)
        schedule = schedule if split is not None else schedule.with_floor(floor)
        recent = max(policy.recent_window, exact_recent(entry_format))
        self.protection = Protection.of(policy.num_sink_tokens, recent, protected)
        self.first_head, self.num_heads = first, count
        self._shape, self._num_q_heads = spec.attention, count * spec.group_size  # asked for in every step
        self.rows = RowTables(schedule, split, batch_size)
        self.layers: list[StoreLayer | None] = [None] * spec.num_budgeted_layers
        self.key_centres = inputs.key_centres(key_centres, len(self.layers), count, spec.attention.key_dim)
        self._wrong, self._finite = NotANumber(len(self.layers)), Finiteness()
        self._planned, self._tables = PlannedStep(), StepTables()
        self._arrival: Arrival | None = None  # what came to the layer before, as more of it comes to the next
        self.first_token = FirstToken()

    @classmethod
    def from_plan(
        cls,
        plan: BudgetPlan,
        *,
        retention: float | None = None,
        tokens: int | None = None,
        context_length: int | None = None,
        min_tokens: int = MIN_TOKENS,
        batch_size: int = 1,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        spec: ModelSpec | None = None,
        protected: Sequence[Sequence[int]] = (),
        decode: DecodeMode = "evict",
        format: str | Format = None,
    ) -> RaggedStore:
        """An empty store under a plan.

        retention: kept fraction of the tokens seen; None means the plan's level if it has just one
        tokens:    instead, mean entries per KV head; with `context_length`, capacities are fixed up front
        spec:      the model's; None means plain attention of the plan's shape
        format:    of the entries, "int8", "int4", or "model", which keeps them in `dtype`; None for the plan's own

        Raises `PlanError` and `BudgetError` as `BudgetPlan.capacities` does.
        """
        if spec is None:
            spec = plan.model.to_spec()
        else:
            spec = spec.sharing(plan.shared_layers)
            plan.check_model(spec)
        policy, ask = policy_of(plan), Ask(retention, tokens, context_length, min_tokens)
        entry_format = plan.entry_format(ask) if format is None else format_of(format)
        least = least_entries(policy, entry_format)
        store = cls(
            spec,
            schedules.from_plan(plan, ask, least=least),
            policy,
            batch_size=batch_size,
            protected=protected,
            decode=decode,
            entry_format=entry_format,
        )
        where = inputs.place(dtype, device)
        for layer in range(spec.num_budgeted_layers):
            store.open(layer, dtype, where)
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
        num_padding: [B], tokens at the start of each row that are padding; of a prompt in several calls a row's padding
            may fill more than one, but none comes behind a token
        scale, sink_logits: [num_q_heads]; what the layer's `LayerSpec` cannot know. Softcap is the spec's.

        Returns [B, num_q_heads, n, Dv]. Within one call, tokens see the store as it was before its evictions.

        Every forward hands its tokens to each layer once, in order. Raises `BudgetError`, before anything is changed,
        for layers out of turn and for tensors that do not fit.
        """
        self._check_tokens(layer, query, key, value)
        valid = inputs.padding_mask(num_padding, self._seen(layer), key.shape[2])
        self._finite.add(layer, queries=query)
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

        Shapes and errors as in `prefill` with n = 1. `BudgetError` also where a row has no token yet: its first ones,
        be it one, come through `prefill`, which is told what is padding.
        """
        self._check_tokens(layer, query, key, value)
        inputs.check_behind_prompt(layer, self._seen(layer))
        if not self.can_append(layer):
            return self.prefill(layer, query, key, value, scale=scale, sink_logits=sink_logits)
        if query.device.type == "cpu":  # a step waits for no device: what is NaN comes out as NaN
            self._finite.add(layer, queries=query)
        scoring = self._scoring(scale, sink_logits)
        self.append(layer, key, value)
        return self.attend_newest(layer, query, scoring)

    # --- its parts, for callers that compute the attention of a prompt themselves

    def positions(self, layer: int) -> list[Tensor]:
        """int64 [length] of each (sequence, KV head): the positions of its entries, in no order."""
        arena = self._layer(layer).arena
        parts = zip(arena.start.tolist(), arena.length.tolist(), strict=True)
        return [arena.positions[start : start + length].long() for start, length in parts]

    def arrive(self, layer: int, key: Tensor, value: Tensor, valid: Tensor | None = None) -> Chunk:
        """Counts new tokens and returns them behind those still pending.

        key, value: [B, H, n, dim];  valid: bool [B, n], False for padding
        """
        entries = self._open(layer, key, value)
        valid = inputs.validity(valid, self.batch_size, key.shape[2])
        if self._arrival is None or not self._arrival.is_of(entries.seen, valid, key.shape[2]):
            self._arrival = Arrival.of(entries.seen, valid, key.shape[2])
        self._check_turn(layer, self._arrival.after)
        self._finite.add(layer, keys=key, values=value)
        self.first_token.begin(key.device)
        if not layer:
            self._bring_tables()
        return entries.arrive(key, value, self._arrival)

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
        inputs.check_query(query, chunk.key, self.batch_size, self._num_q_heads)
        if mask is None and chunk.places.has_padding:
            mask = chunk_mask(chunk, query.shape[2])
        tokens, options = chunk.masked(mask), scoring.options()
        if arena.width and entry_mask is None:
            return arena.attend_among(query, tokens, options)
        # of a whole prompt, and under masks of entries, an op looks at the lengths
        return ragged_attention(query, arena.counted_segments, tokens, entry_mask=entry_mask, **options)

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
        entries, is_last = self._layer(layer), layer == len(self.layers) - 1
        if query.shape[2]:
            inputs.check_query(query, chunk.key, self.batch_size, self._num_q_heads)
        settling, scores = entries.settling(chunk, hold), None
        if is_last:  # else nobody waits for the device here
            self._finite.check()
            self._arrival = None
        if settling and (self.split is None or entries.arena.scores is None):  # a split has to see the scores first
            self._grow(entries, entries.settled + chunk.part(slice(0, settling)).count)
        if settling and entries.arena.scores is not None:
            scores = score_chunk(self.policy, entries, query, chunk, scoring.options(), extra or {})
            scores = scores[:, : entries.arena.width + settling]  # pending tokens compete once they settle
            self._wrong.add(layer, scores)
            if self.split is not None or is_last:  # a split would apportion by NaN
                self._wrong.check(self.policy, "score_prompt")
        entries.arena.watch_queries(query, chunk)
        statistics, split = None, self.split
        if split is not None and scores is not None:
            statistics = attention_statistics(split.allocator.requires, self.policy, entries, query, chunk, scoring)
        settled = entries.settle(chunk, settling)
        if not settling:
            return
        if self.split is not None and scores is not None:
            split_layers(self.rows, self._opened()[: layer + 1], scores, settled, statistics)
        entries.fold(settled, scores)

    # --- what becomes of a batch

    def take(self, rows: Tensor) -> None:
        """Keeps these sequences, in this order and as often as they stand there. rows: int64 [B']."""
        rows = inputs.row_indices(rows, self.batch_size)
        for layer in self._opened():
            layer.take(rows)
        self.rows.take(rows.tolist())
        self.batch_size, self._planned = len(rows), PlannedStep()  # what was planned is of other rows
        self._tables.forget()

    def crop(self, count: int) -> None:
        """Takes back the last `count` tokens of every sequence.

        Columns, as they came: a column of pending tokens that was padding takes nothing from its row.
        Raises `BudgetError`, before anything is changed, where an entry was evicted since: it would be missing.
        Where no entry was, scores stay as the tokens taken back have left them.
        """
        count = inputs.token_count(count)
        for layer in self._opened():  # all of them first: a refusal changes nothing
            layer.check_crop(count)
        for layer in self._opened():
            layer.crop(count)

    # --- what becomes of all of it

    def rebudget(self, schedule: Schedule, split: RuntimeSplit | None) -> None:
        """Other budgets for what is held: evicts down to them by the scores that the entries have.

        Behind a prompt that was scored and nothing of which was evicted, it then holds what it would have held under
        these budgets from the first token on: selection looks at scores and positions alone.
        """
        self.rows, layers = RowTables(schedule, split, self.batch_size), self._opened()
        self._planned = PlannedStep()  # it was planned under other capacities
        for index, layer in enumerate(layers):
            if split is None:
                self._grow(layer, self.seen)
            else:
                split_layers(self.rows, layers[: index + 1])
            layer.shrink()

    def withdraw(self) -> None:
        """Forgets tokens that arrived and are not to be kept."""
        for layer in self._opened():
            layer.withdraw()

    def fork(self) -> RaggedStore:
        """A copy that goes its own way."""
        return copy_with(
            self,
            rows=self.rows.fork(),
            layers=[None if layer is None else layer.fork() for layer in self.layers],
            _wrong=self._wrong.fork(),
            _finite=self._finite.fork(),
            _planned=PlannedStep(),
            _tables=StepTables(),
            first_token=copy.copy(self.first_token),
        )

    def report(self) -> CacheReport:
        """What was kept, what it weighs, and whether anything was evicted at all."""
        return report_of(self)
