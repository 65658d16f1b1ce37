"""One layer of a store: its arena, what it has seen, and what leaves it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from kvpolicy_kernels.attention import WorkPlan
from kvpolicy_kernels.evict import evict, evict_into, rank
from numpy.typing import NDArray
from torch import Tensor

from kvpolicy.cache.arena import LayerArena
from kvpolicy.cache.chunk import Arrival, Chunk, Places
from kvpolicy.cache.copies import copy_with
from kvpolicy.cache.device_tables import on_device
from kvpolicy.cache.eviction_order import eviction_order
from kvpolicy.cache.schedule import UNLIMITED
from kvpolicy.cache.select import ABSENT, Protection, comparable, kept_columns
from kvpolicy.cache.tail import Columns, Tail
from kvpolicy.errors import BudgetError

if TYPE_CHECKING:
    from kvpolicy.cache.step import LayerStep, TailStep


POSITIONS_STEP = 4096


class StoreLayer:
    """Entries of one layer, for a batch of sequences.

    index:      which of the budgeted layers this is
    seen:       int64 [B], tokens of each sequence, padding excluded, pending ones included
    settled:    int64 [B], those of them that were written or given up: not the pending ones, nor a chunk under way
    table:      int64 [B, H], capacities without protected spans, which come on top
    evicted_at: int64 [B], settled tokens when something was last evicted; 0 if nothing ever was
    decoded:    single tokens since the last longer forward
    knows_order: whether what leaves next needs no search: nothing is scored, or scores stay what the prompt made them
        and decoded tokens outlive its entries
    pending:    tokens that may still be taken back; attended to, not in the arena yet
    """

    def __init__(
        self,
        index: int,
        arena: LayerArena,
        batch_size: int,
        num_heads: int,
        protection: Protection,
        *,
        scores_stay: bool,
    ) -> None:
        self.index = index
        self.knows_order = scores_stay or arena.scores is None
        self.arena, self.num_heads, self.protection = arena, num_heads, protection
        self.seen = torch.zeros(batch_size, dtype=torch.int64)
        self.settled = torch.zeros(batch_size, dtype=torch.int64)
        self.evicted_at = torch.zeros(batch_size, dtype=torch.int64)
        self.table = torch.zeros(batch_size, num_heads, dtype=torch.int64)
        self.decoded = 0
        self.is_unwritten = False  # between `settle` and `fold`
        self.pending: Chunk | None = None
        self.is_ring = True  # entries lie pinned first, then in the order in which they will leave

    @property
    def spanned(self) -> Tensor:
        """int64 [B], settled tokens in protected spans, which come on top of the table."""
        return self._spanned(self.settled)

    @property
    def capacity(self) -> Tensor:
        """int64 [S], entries allowed now, pending tokens not counted."""
        return self.capacity_behind(self.settled)

    def capacity_behind(self, settled: Tensor) -> Tensor:
        """int64 [S], entries allowed by the same table when so many tokens are settled. settled: int64 [B]"""
        if not self.protection.spans:
            return self.table.flatten()
        return (self.table + self._spanned(settled)[:, None]).clamp(max=UNLIMITED).flatten()

    @property
    def has_order(self) -> bool:
        """Whether what leaves next needs no search: the order is known, and no token to come is pinned."""
        spans = self.protection.spans
        return self.knows_order and (not spans or self.protection.end <= int(self.seen.min()))

    @property
    def num_held(self) -> Tensor:
        """int64 [S], entries and pending tokens."""
        if self.pending is None:
            return self.arena.length
        return self.arena.length + self._per_segment(self.pending.count)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor held, by name."""
        own = {name: getattr(self, name) for name in ("seen", "settled", "evicted_at", "table")}
        if (pending := self.pending) is not None:
            own |= {f"pending.{name}": getattr(pending, name) for name in ("key", "value", "positions")}
            own |= pending.columns.tensors if isinstance(pending, Tail) else {}
        return {**self.arena.tensors, **own}

    def check_settled(self) -> None:
        """Raises `BudgetError` where tokens came and were never kept."""
        waiting = self.settled if self.pending is None else self.settled + self.pending.count
        if self.is_unwritten or not torch.equal(waiting, self.seen):
            raise BudgetError(
                f"layer {self.index} was handed tokens that it has not kept, {self.seen.tolist()} in all: a forward "
                "broke off, and they are lost. Start again with a new store"
            )

    def settling(self, chunk: Chunk, hold: int) -> int:
        """How many first tokens of a chunk are to be written or given up, if its last `hold` ones stay pending.

        Raises `BudgetError` for another chunk than the one that came last.
        """
        if self.is_unwritten or not torch.equal(self.settled + chunk.count, self.seen):
            raise BudgetError(
                f"layer {self.index} has seen {self.seen.tolist()} tokens, {self.settled.tolist()} of which were kept "
                f"or given up, and is to keep {chunk.count.tolist()}: keep takes what arrive returned, once"
            )
        if hold < 0:
            raise BudgetError(f"hold is {hold}, expected the number of last tokens that stay pending")
        return max(0, len(chunk) - hold)

    def settle(self, chunk: Chunk, settling: int) -> Chunk:
        """Returns the first tokens of a chunk, for `fold`; the others become the pending ones."""
        settled, pending, after = chunk.part(slice(0, settling)), None, self.seen
        if settling < len(chunk):  # a view would keep the whole prompt
            pending, after = chunk.part(slice(settling, None)).owned(), self.settled + settled.count
        self.pending = pending
        # until `fold` has come, so that a forward that breaks off in between is noticed
        self.settled, self.is_unwritten = after, settling > 0
        self.decoded = 0 if settling else self.decoded  # budgets have grown now; the next time is counted from here
        return settled

    def arrive(self, key: Tensor, value: Tensor, arrival: Arrival) -> Chunk:
        """Counts new tokens and returns them behind those still pending."""
        self.check_settled()
        self.seen, places = arrival.after, arrival.places
        if (pending := self.pending) is not None:
            key, value = torch.cat([pending.key, key], 2), torch.cat([pending.value, value], 2)
            places = Places(torch.cat([pending.positions, places.on_host], 1))
        return Chunk(key, value, places.on_host, _places=places)

    def append(self, key: Tensor, value: Tensor, score: float, *, evict: bool) -> None:
        """Writes one token into every segment; over its worst entry where it is full, if `evict`.

        key, value: [B, H, 1, dim];  score: the new entry's
        """
        self.check_settled()
        # first: the recent window, which protects entries below, ends behind this token
        self.seen, self.settled, self.decoded = self.seen + 1, self.settled + 1, self.decoded + 1
        arena, limit = self.arena, self.limit(evict, self.settled)
        arena.reserve(limit)
        full = arena.length >= limit
        self._note_eviction(full.numpy())
        position = self._per_segment(self.seen - 1)
        arena.append(key.detach(), value.detach(), position, self._next_slot(full), score)

    @property
    def is_ready(self) -> bool:
        """Whether a token's tables follow from counts: all those before it have been kept or given up."""
        return (
            self.pending is None
            and not self.is_unwritten
            and (self.settled is self.seen or torch.equal(self.settled, self.seen))  # the same behind a planned step
        )

    def limit(self, evict: bool, settled: Tensor) -> Tensor:
        """int64 [S], entries from which on a segment gives one up, if it does that at all. settled: int64 [B]"""
        return self.capacity_behind(settled) if evict else torch.full_like(self.arena.length, UNLIMITED)

    def make_ring(self, limit: Tensor) -> None:
        """Lays the entries in the order in which they will leave, where there is one. limit: int64 [S]."""
        has_order = self.has_order
        if self.is_ring or not has_order:
            self.is_ring &= has_order  # a token that is pinned will lie among others
            return
        arena, scores = self.arena, self.arena.padded_scores()
        positions, keys = self._ranked(None)
        # pinned ones, then by age: without scores that is the order already
        columns = kept_columns(keys, arena.length, self.protection)
        before = positions, scores
        if scores is not None:
            surplus = torch.arange(arena.width, device=arena.device) >= on_device(arena.length, arena.device)[:, None]
            positions, scores = positions.gather(1, columns), scores.gather(1, columns)
            spare = on_device(limit - arena.length, arena.device)
            # behind a segment's length the columns mean nothing
            positions, scores = positions.masked_fill(surplus, -1), scores.masked_fill(surplus, -torch.inf)
            seen = on_device(self._per_segment(self.settled)[:, None], arena.device)
            columns = columns.gather(1, eviction_order(scores, positions, seen, spare, self.protection))
        arena.replace(columns, arena.length, arena.allocated, *before)
        self.is_ring = True

    def write(self, key: Tensor, value: Tensor, step: LayerStep, score: float, work: WorkPlan | None) -> None:
        """`append`, where what it comes to has been worked out. Arguments as there."""
        self._pass(step)
        arena, placement = self.arena, step.placement
        if step.searches:
            tables = placement.start, placement.length, placement.seen
            evict_into(placement.row, arena.scores, arena.positions, *tables, **self._protection_options())
        arena.write(key.detach(), value.detach(), step, placement, score, work)

    def open_tail(self, columns: Columns) -> None:
        """Brings the pending tokens into a block in which more find room."""
        self.pending = Tail.over(self.pending or self.arena.no_tokens(len(self.seen)), columns)

    def write_on_top(self, key: Tensor, value: Tensor, step: TailStep) -> None:
        """Writes a token behind the pending ones. key, value: [B, H, 1, dim]."""
        step.before.write(key, value)
        self.pass_on_top(step)

    def pass_on_top(self, step: TailStep) -> None:
        """The host's part of `write_on_top`."""
        self.seen, self.pending = step.seen, step.before.longer(step.positions)

    def attend(self, query: Tensor, options: Mapping[str, Any]) -> Tensor:
        """The attention of a token over all entries and those on top. Arguments as in `LayerArena.attend`."""
        if isinstance(self.pending, Tail):
            return self.arena.attend_beside(query, self.pending.whole, options)
        return self.arena.attend(query, options)

    def bookmark(self) -> Callable[[], None]:
        """Returns what takes the counts back to here; entries stay where they are."""
        own, arena = dict(vars(self)), self.arena.bookmark()

        def restore() -> None:
            vars(self).update(own)
            arena()

        return restore

    @property
    def max_positions(self) -> int:
        """An int above every position, which changes seldom: a graph holds it."""
        return (int(self.seen.max()) // POSITIONS_STEP + 1) * POSITIONS_STEP

    def pass_step(self, step: LayerStep) -> None:
        """The host's part of a step whose entry a graph has written."""
        self._pass(step)
        self.arena.pass_step(step)

    def candidates(self, chunk: Chunk) -> Tensor:
        """int64 [S, width + n] on the device, positions of [entries ; chunk], -1 where absent. A copy"""
        if not self.arena.width:
            return chunk.positions_on(self.arena.device).clone().flatten(0, 1)
        return self._ranked(None, chunk)[0]

    def fold(self, chunk: Chunk, scores: Tensor | None) -> None:
        """Evicts from [entries ; chunk] down to the capacities.

        scores: float32 [S, width + len(chunk)], or None: then the most recent are kept
        """
        came = chunk.count.numpy().repeat(self.num_heads)
        self._retain(scores, torch.from_numpy(self.arena.length.numpy() + came), chunk)
        self.is_unwritten = False

    def shrink(self) -> None:
        """Evicts down to capacities that were lowered."""
        arena = self.arena
        if bool((arena.length > self.capacity).any()):
            self._retain(arena.padded_scores(), arena.length, None)

    def compared(self, scores: Tensor | None = None, chunk: Chunk | None = None) -> Tensor:
        """Scores of the entries, or of [entries ; chunk], as they compete: see `comparable`. float32 [B, H, N]."""
        scores = self.arena.padded_scores() if scores is None else scores
        assert scores is not None
        return comparable(scores, *self._ranked(None, chunk), self.protection).view(*self.table.shape, -1)

    def allow(self, table: Tensor) -> None:
        """Sets the capacities. table: int64 [B, H]; `shrink` evicts down to them where they are lower."""
        if self.arena.scores is not None and self.protection.recent_window and not torch.equal(table, self.table):
            self.is_ring = False  # what the recent window protects has more time to become free
        self.table = table

    def _pass(self, step: LayerStep) -> None:
        self.seen = self.settled = step.seen
        self.evicted_at = step.evicted_at
        self.decoded += 1

    def withdraw(self) -> None:
        """Forgets tokens that arrived and are not to be kept: the forward that brought them was only a look."""
        self.seen = self.settled if self.pending is None else self.settled + self.pending.count

    def fork(self) -> StoreLayer:
        """A copy. Counts and pending tokens are shared: nobody writes into them, and a block is not gone on with."""
        pending = None if self.pending is None else self.pending.part(slice(None))
        return copy_with(self, arena=self.arena.fork(), pending=pending)

    def resume(self, counts: Mapping[str, Tensor], pending: Chunk | None, *, decoded: int) -> None:
        """Goes on with what was packed, over entries that lie by position. counts: `seen`, `evicted_at` and `table`."""
        self.seen, self.evicted_at, self.table = (counts[name] for name in ("seen", "evicted_at", "table"))
        self.pending, self.decoded, self.is_ring = pending, decoded, False
        self.settled = self.seen if pending is None else self.seen - pending.count

    # --- rows that are slots

    def furnish(self, rows: int, idle: int, seen: int) -> None:
        """Gives the arena these many rows, whose first `idle` are those of every row without a sequence.

        seen: tokens that such a row says it has seen
        """
        self.arena.furnish(rows, idle)
        count = torch.full_like(self.seen, seen)
        self.seen, self.settled, self.decoded = count, count, 1
        self.table = torch.full_like(self.table, idle)

    def seat(self, row: int, other: StoreLayer, start: int, table: Tensor) -> None:
        """A sequence becomes a row. table: int64 [H], its capacities;  start: the first of its rows in the arena"""
        other.make_ring(table)
        self.arena.seat(self._segments(row), other.arena, start + table.cumsum(0) - table, table)
        self._set_row(row, other.seen[0], table)

    def vacate(self, row: int, idle: int, seen: int) -> None:
        """A sequence has left its row."""
        self.arena.vacate(self._segments(row), idle)
        self._set_row(row, torch.tensor(seen), torch.full_like(self.table[row], idle))

    def move(self, row: int, before: int, after: int, count: int) -> None:
        """The rows of a sequence get another place in the arena, towards its beginning."""
        self.arena.move(self._segments(row), before, after, count)

    def _segments(self, row: int) -> slice:
        return slice(row * self.num_heads, (row + 1) * self.num_heads)

    def _set_row(self, row: int, seen: Tensor, table: Tensor) -> None:
        own = torch.arange(len(self.seen)) == row
        self.seen = self.settled = torch.where(own, seen, self.seen)
        self.evicted_at = torch.where(own, 0, self.evicted_at)
        self.table = torch.where(own[:, None], table, self.table)

    def take(self, rows: Tensor) -> None:
        """Keeps these sequences, in this order. rows: int64 [B'] on the CPU."""
        self.arena.take((rows[:, None] * self.num_heads + torch.arange(self.num_heads)).flatten())
        self.seen, self.settled = self.seen[rows], self.settled[rows]
        self.evicted_at, self.table = self.evicted_at[rows], self.table[rows]
        if (pending := self.pending) is not None:
            on_device = rows.to(pending.key.device)
            self.pending = Chunk(pending.key[on_device], pending.value[on_device], pending.positions[rows])

    def check_crop(self, count: int) -> None:
        """Raises `BudgetError` where the last `count` tokens cannot be taken back exactly."""
        pending = 0 if self.pending is None else len(self.pending)
        possible = pending + int((self.settled - self.evicted_at).min())  # an eviction is not undone
        if count > max(pending, possible):
            why = "entries were evicted since" if bool(self.evicted_at.any()) else "there are no more"
            raise BudgetError(
                f"the last {count} tokens cannot be taken back, only {possible}: {why}. Tokens that may be rejected "
                "need a rollback= as long as they are"
            )

    def crop(self, count: int) -> None:
        """Takes back the last `count` tokens of every sequence, after `check_crop`."""
        left = count  # the pending tokens are the newest: they go first
        if (pending := self.pending) is not None:
            kept = max(0, len(pending) - count)
            left -= len(pending) - kept
            self.seen = self.seen - pending.part(slice(kept, None)).count
            self.pending = pending.part(slice(0, kept)).owned() if kept else None
        if left:
            self.seen, self.settled = self.seen - left, self.settled - left
            arena, (positions, keys) = self.arena, self._ranked(None)
            taken = positions >= on_device(self._per_segment(self.settled)[:, None], arena.device)
            self._rebuild(keys.masked_fill(taken, ABSENT), positions, arena.length - left, None, arena.padded_scores())
            self.arena.forget(self.settled)

    def _retain(self, scores: Tensor | None, available: Tensor, chunk: Chunk | None) -> None:
        """Keeps the best candidates of each segment. scores: [S, N];  available: int64 [S], present ones."""
        counts = np.minimum(available.numpy(), self.capacity.numpy())
        self._note_eviction(counts < available.numpy())
        positions, keys = self._ranked(scores, chunk)
        self._rebuild(keys, positions, torch.from_numpy(counts), chunk, scores)

    def _ranked(self, scores: Tensor | None, chunk: Chunk | None = None) -> tuple[Tensor, Tensor]:
        """Positions and keys of [entries ; chunk], as in `rank`."""
        arena, places = self.arena, None if chunk is None else chunk.places
        fresh = None if places is None else places.on(arena.device)
        # the same for all layers; while the chunk is not settled positions alone are asked for
        if places is not None and places.after is self.seen:
            settled = places.after_on(arena.device)
        else:
            settled = on_device(self.settled, arena.device)
        options = self._protection_options()
        return rank(scores, arena.positions, *arena.brought, settled, width=arena.width, fresh=fresh, **options)

    def _rebuild(
        self, keys: Tensor, positions: Tensor, counts: Tensor, chunk: Chunk | None, scores: Tensor | None
    ) -> None:
        """Keeps the `counts` candidates with the largest keys, pinned ones first, then by age."""
        in_order = chunk is not None and not self.arena.width
        columns = kept_columns(keys, counts, self.protection, in_order=in_order)
        room = self.arena.room(counts, self.capacity)
        self.arena.replace(columns, counts, room, positions, scores, chunk)
        self.is_ring = self.arena.scores is None  # entries lie in the order of age

    def _next_slot(self, full: Tensor) -> Tensor:
        """The slot of each segment's next entry, int64 [S]: its end, or where it is full its worst entry's."""
        arena = self.arena
        self.is_ring = False  # a new entry may lie between older ones
        slot = arena.length
        if bool(full.any()):
            tables = torch.stack([arena.start, arena.length, self._per_segment(self.settled)])
            worst = self._worst(*on_device(tables, arena.device))
            slot = torch.where(full.to(arena.device), worst, slot.to(arena.device))
        arena.count(~full)  # last: all above goes by the lengths before
        return slot

    def _worst(self, start: Tensor, length: Tensor, settled: Tensor) -> Tensor:
        """The slot of each segment's worst entry. All int64 [S], on the device."""
        arena = self.arena
        return evict(arena.scores, arena.positions, start, length, settled, **self._protection_options())

    def _protection_options(self) -> dict[str, Any]:
        protection = self.protection
        return {
            "num_sink_tokens": protection.num_sink_tokens,
            "recent_window": protection.recent_window,
            "spans": protection.spans,
        }

    def _spanned(self, settled: Tensor) -> Tensor:
        return torch.tensor([self.protection.num_spanned(count) for count in settled.tolist()])

    def _note_eviction(self, segments: NDArray[np.bool_]) -> None:
        """segments: bool [S], those that lose an entry now."""
        if not segments.any():
            return
        rows = segments.reshape(len(self.evicted_at), -1).any(1)
        self.evicted_at = torch.from_numpy(np.where(rows, self.settled.numpy(), self.evicted_at.numpy()))

    def _per_segment(self, per_row: Tensor) -> Tensor:
        """[B, ...] to [S, ...], by numpy: torch makes four operations of it."""
        return torch.from_numpy(per_row.numpy().repeat(self.num_heads, 0))

    def seen_on_device(self) -> Tensor:
        """int64 [B]."""
        if (placed := self.arena.placed) is not None:
            return placed.seen[:: self.num_heads]
        return on_device(self.seen, self.arena.device)
