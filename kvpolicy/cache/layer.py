"""One layer of a store: its arena, what it has seen, and what leaves it."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpolicy.cache.arena import LEAST_GROWTH, Chunk, LayerArena
from kvpolicy.cache.select import MAX_TOKENS, Protection, evictable, kept_columns, ranking
from kvpolicy.errors import BudgetError


class StoreLayer:
    """Entries of one layer, for a batch of sequences.

    seen:       int64 [B], tokens of each sequence, padding excluded, pending ones included
    evicted_at: int64 [B], tokens seen when something was last evicted; 0 if nothing ever was
    decoded:    single tokens since the last longer forward
    pending:    tokens that may still be taken back; attended to, not in the arena yet
    """

    def __init__(self, arena: LayerArena, batch_size: int, num_heads: int, protection: Protection) -> None:
        self.arena, self.num_heads, self.protection = arena, num_heads, protection
        self.seen = torch.zeros(batch_size, dtype=torch.int64)
        self.evicted_at = torch.zeros(batch_size, dtype=torch.int64)
        self.decoded = 0
        self.pending: Chunk | None = None

    @property
    def num_pending(self) -> Tensor:
        """int64 [S], pending tokens, padding excluded."""
        if self.pending is None:
            return torch.zeros_like(self.arena.length)
        return self._per_segment((self.pending.positions >= 0).sum(1))

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor held, by name."""
        held = {**self.arena.tensors, "seen": self.seen, "evicted_at": self.evicted_at}
        if self.pending is not None:
            held |= {f"pending.{name}": getattr(self.pending, name) for name in ("key", "value", "positions")}
        return held

    def set_capacity(self, table: Tensor) -> None:
        """table: int64 [B, H], without protected spans, which come on top."""
        spanned = torch.tensor([self.protection.num_spanned(count) for count in self.seen.tolist()])[:, None]
        self.arena.capacity = (table + spanned).clamp(max=torch.iinfo(torch.int32).max).flatten()
        self.arena.num_pinned = self._per_segment(spanned[:, 0] + self.protection.num_sink_tokens)

    def arrive(self, key: Tensor, value: Tensor, valid: Tensor | None) -> Chunk:
        """Counts new tokens and returns them behind those still pending. valid: bool [B, n] on the CPU or None."""
        steps = torch.arange(key.shape[2])[None].expand(len(self.seen), -1)
        if valid is not None:
            steps = torch.where(valid, valid.cumsum(1) - 1, -1)
        positions = torch.where(steps >= 0, steps + self.seen[:, None], -1)
        self.seen = torch.maximum(self.seen, positions.amax(1) + 1)
        if int(self.seen.max()) > MAX_TOKENS:
            raise BudgetError(f"a sequence can have {MAX_TOKENS} tokens at most")
        if self.pending is None:
            return Chunk(key, value, positions)
        held = self.pending
        return Chunk(
            torch.cat([held.key, key], 2), torch.cat([held.value, value], 2), torch.cat([held.positions, positions], 1)
        )

    def append(self, key: Tensor, value: Tensor, limit: Tensor, score: float) -> None:
        """Writes one token into every segment; at `limit` (int64 [S]) over its worst entry. key, value: [B, H, 1, dim]."""
        self.seen = self.seen + 1
        arena = self.arena
        arena.reserve(limit)
        full = arena.length >= limit
        if bool(full.any()):
            self._note_eviction(full)
        slot = arena.advance(limit) if arena.scores is None else self._scored_slot(full)
        arena.append(key, value, self._per_segment(self.seen - 1), slot, score)

    def fold(self, chunk: Chunk, scores: Tensor | None, hold: int) -> None:
        """Evicts from [entries ; chunk] down to the capacities, the last `hold` tokens of the chunk excepted.

        scores: float32 [S, width + len(chunk)], or None: then the most recent are kept
        """
        arena, kept = self.arena, max(0, len(chunk) - hold)
        folded = Chunk(chunk.key[:, :, :kept], chunk.value[:, :, :kept], chunk.positions[:, :kept])
        scores = None if scores is None else scores[:, : arena.width + kept]
        available = arena.length + self._per_segment((folded.positions >= 0).sum(1))
        counts = torch.minimum(available, arena.capacity)
        if bool((counts < available).any()):
            self._note_eviction(counts < available)
        fresh = folded.positions.repeat_interleave(self.num_heads, 0).to(arena.device)
        positions = torch.cat([self._positions(), fresh], 1)
        self._retain(positions, scores, counts, folded)
        # cloned: a view would keep the whole chunk alive
        rest = (chunk.key[:, :, kept:], chunk.value[:, :, kept:], chunk.positions[:, kept:])
        self.pending = Chunk(*(x.clone() for x in rest)) if kept < len(chunk) else None

    def shrink(self) -> None:
        """Evicts down to capacities that were lowered."""
        counts = torch.minimum(self.arena.length, self.arena.capacity)
        if bool((counts < self.arena.length).any()):
            self._note_eviction(counts < self.arena.length)
            self._retain(self._positions(), self.held_scores(), counts, None)

    def take(self, rows: Tensor) -> None:
        """Keeps these sequences, in this order. rows: int64 [B'] on the CPU."""
        segments = (rows[:, None] * self.num_heads + torch.arange(self.num_heads)).flatten()
        self.arena.take(segments)
        self.seen, self.evicted_at = self.seen[rows], self.evicted_at[rows]
        if (held := self.pending) is not None:
            on_device = rows.to(held.key.device)
            self.pending = Chunk(held.key[on_device], held.value[on_device], held.positions[rows])

    def check_crop(self, count: int) -> None:
        """Raises `BudgetError` where the last `count` tokens cannot be taken back exactly."""
        pending = 0 if self.pending is None else len(self.pending)
        if count > pending and bool((self.seen - count < self.evicted_at).any()):
            possible = max(pending, int((self.seen - self.evicted_at).min()))
            raise BudgetError(
                f"the last {count} tokens cannot be taken back: entries were evicted since. At most {possible} can; "
                "tokens that may be taken back need a rollback= of their number."
            )

    def crop(self, count: int) -> None:
        """Takes back the last `count` tokens of every sequence, after `check_crop`."""
        held, left = self.pending, count
        if held is not None:
            kept = len(held) - min(count, len(held))
            left -= len(held) - kept
            self.seen = self.seen - (held.positions[:, kept:] >= 0).sum(1)
            rest = (held.key[:, :, :kept], held.value[:, :, :kept], held.positions[:, :kept])
            self.pending = Chunk(*(x.clone() for x in rest)) if kept else None
        if left:
            self.seen = self.seen - left
            positions = self._positions()
            oldest_first = torch.where(positions < 0, -1, MAX_TOKENS - positions)
            counts = self.arena.length - left
            columns = kept_columns(oldest_first, positions, counts, self.protection)
            self.arena.replace(columns, counts, counts, scores=self.held_scores())

    def held_scores(self) -> Tensor | None:
        """float32 [S, width], -inf where absent; None under the window rule."""
        scores, rows = self.arena.scores, self.arena.padded_rows()
        if scores is None:
            return None
        if not rows.shape[1]:
            return rows.float()
        return scores[rows.clamp(min=0)].masked_fill(rows < 0, float("-inf"))

    def _positions(self) -> Tensor:
        """int64 [S, width] on the device, -1 where absent."""
        rows = self.arena.padded_rows()
        if not rows.shape[1]:
            return rows
        return torch.where(rows < 0, -1, self.arena.positions[rows.clamp(min=0)].long())

    def _retain(self, positions: Tensor, scores: Tensor | None, counts: Tensor, chunk: Chunk | None) -> None:
        """Keeps the `counts` best candidates of each segment. positions, scores: [S, N]."""
        if not positions.shape[1]:
            return
        keys = ranking(scores, positions, self._seen_on_device(), self.protection)
        columns = kept_columns(keys, positions, counts, self.protection)
        room = torch.minimum(counts + (counts // 32).clamp(min=LEAST_GROWTH), self.arena.capacity)
        self.arena.replace(columns, counts, torch.maximum(room, counts), chunk, scores)

    def _scored_slot(self, full: Tensor) -> Tensor:
        """The slot of each segment's next entry, int64 [S]: its end, or where it is full its worst entry's."""
        arena = self.arena
        slot = arena.length
        if bool(full.any()):
            worst = evictable(ranking(self.held_scores(), self._positions(), self._seen_on_device(), self.protection))
            slot = torch.where(full.to(arena.device), worst, slot.to(arena.device))
        arena.length = arena.length + ~full
        return slot

    def _note_eviction(self, segments: Tensor) -> None:
        """segments: bool [S], those that lose an entry now."""
        rows = segments.view(len(self.seen), -1).any(1)
        self.evicted_at = torch.where(rows, self.seen, self.evicted_at)

    def _per_segment(self, per_row: Tensor) -> Tensor:
        """[B] to [S]."""
        return per_row.repeat_interleave(self.num_heads)

    def _seen_on_device(self) -> Tensor:
        """int64 [S, 1]."""
        return self._per_segment(self.seen)[:, None].to(self.arena.device)
