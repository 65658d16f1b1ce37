"""One layer's entries: an arena of rows, a segment of it for each (sequence, KV head), and what moves them.

Segment i belongs to sequence `i // num_heads` and KV head `i % num_heads` and owns the rows from `start[i]` to
`start[i] + allocated[i]`, of which the first `length[i]` hold entries. Tables lie on the CPU: they follow from counts
alone, so keeping them needs no word from the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from kvpolicy_kernels.append import append
from kvpolicy_kernels.attention import WorkPlan, decode_attention, ragged_attention
from kvpolicy_kernels.compact import compact
from kvpolicy_kernels.key_centre import KeyCentre
from kvpolicy_kernels.rebuild import rebuild
from kvpolicy_kernels.rebuild.op import Chosen
from kvpolicy_kernels.segments import Chunk as MaskedChunk
from kvpolicy_kernels.segments import EncodedSegments, ExactCopies, Segments
from torch import Tensor

from kvpolicy.cache.chunk import Chunk
from kvpolicy.cache.copies import copy_with
from kvpolicy.cache.device_tables import Brought, Placed, each_entry, on_device, owners_of

LEAST_GROWTH = 64  # rows; and a 32nd of the length, so that growing costs a 32nd of an append's reads
_TABLES = ("start", "length", "allocated", "cursor")
_FREE = {"positions": -1, "scores": -torch.inf}

if TYPE_CHECKING:
    from kvpolicy.cache.step import LayerStep, Placement


class LayerArena:
    """Keys, values, positions and scores of one layer.

    keys [R, D];  values [R, Dv];  positions int32 [R];  scores float32 [R], or None where nothing is scored
    start, length, allocated: int64 [S], in rows
    cursor:     int64 [S], the ring's oldest entry, counted from `num_pinned`
    num_pinned: first entries of a segment, which the ring leaves alone
    layout:     another object whenever the entries lie at other addresses; a graph that knows the old ones is of no use
    moves:      how often that was so
    is_shuffled: whether segments lie in another order than that of their numbers, as those of slots do
    columns:    names of the tensors that hold keys and values; `EncodedArena` has others
    """

    columns: ClassVar[tuple[str, ...]] = ("keys", "values")
    num_programs: int | None = None  # that share the attention of a token on a GPU; None for as many as usual
    key_centre: KeyCentre | None = None  # what codes of keys are less of
    start: Tensor
    length: Tensor
    allocated: Tensor
    cursor: Tensor

    def __init__(
        self,
        num_segments: int,
        key_dim: int,
        value_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        num_pinned: int,
        scored: bool,
    ) -> None:
        self.keys = torch.empty(0, key_dim, dtype=dtype, device=device)
        self.values = torch.empty(0, value_dim, dtype=dtype, device=device)
        self.positions = torch.empty(0, dtype=torch.int32, device=device)
        self.scores = torch.empty(0, dtype=torch.float32, device=device) if scored else None
        self.num_pinned, self.layout, self.moves, self.is_shuffled = num_pinned, object(), 0, False
        self._placed: Placed | None = None
        self._brought: Brought | None = None
        self._new_scores: Tensor | None = None  # float32 [S], of decoded tokens: always the same
        for name in _TABLES:
            setattr(self, name, torch.zeros(num_segments, dtype=torch.int64))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor held, by name."""
        tensors = self.entries | {name: getattr(self, name) for name in _TABLES}
        tensors |= {} if self._new_scores is None else {"new_scores": self._new_scores}
        if (brought := self._brought) is not None:
            tensors |= {"brought": brought.tables}
            tensors |= {} if brought.work is None else {"brought.work": brought.work.units}
        if (placed := self._placed) is not None:
            tensors |= {f"placed.{name}": getattr(placed, name) for name in ("starts", "lengths", "seen")}
            tensors |= {} if placed.work is None else {"placed.work": placed.work.units}  # all of it is one tensor
        return tensors

    @property
    def entries(self) -> dict[str, Tensor]:
        """The tensors that have a row for each entry, by name."""
        names = (*self.columns, "positions", "scores")
        return {name: tensor for name in names if (tensor := getattr(self, name)) is not None}

    @property
    def like(self) -> Tensor:
        """A tensor [any, D] of the dtype and the device that keys have when they come."""
        return self.keys

    @property
    def vectors(self) -> tuple[Tensor, Tensor]:
        """Keys [R, D] and values [R, Dv] as numbers, which nobody may write into."""
        return self.keys, self.values

    def no_tokens(self, batch_size: int) -> Chunk:
        """An empty chunk of what comes here."""
        shape = batch_size, len(self.start) // batch_size, 0
        key, value = (self.like.new_empty(*shape, dim) for dim in (self.like.shape[1], self.value_dim))
        return Chunk(key, value, torch.zeros(batch_size, 0, dtype=torch.int64))

    @property
    def placed(self) -> Placed | None:
        """What a step has brought to the device, unless something has changed since."""
        return self._placed if self._placed is not None and self._placed.length is self.length else None

    @property
    def segments(self) -> Segments:
        """As the ops take them: with tables on the device, where a step has brought them there."""
        if (placed := self.placed) is not None:
            return Segments(*self.vectors, placed.starts, placed.lengths)
        return self.counted_segments

    @property
    def counted_segments(self) -> Segments:
        """With tables of the host: an op may ask for lengths without waiting for a device."""
        return Segments(*self.vectors, self.start, self.length)

    @property
    def read_segments(self) -> tuple[Segments | EncodedSegments, ExactCopies | None]:
        """With tables on the device, for ops that read codes where there are any, with exact copies beside them."""
        return Segments(*self.vectors, *self.brought), None

    @property
    def brought(self) -> tuple[Tensor, Tensor]:
        """Starts and lengths on the device, int64 [S] each, which go there once until the entries change."""
        if self._still_brought is None:  # what is placed may be of the next token already
            self.bring(on_device(torch.stack([self.start, self.length]), self.device), None)
        assert self._brought is not None  # since the line above
        starts, lengths = self._brought.tables
        return starts, lengths

    @property
    def _still_brought(self) -> Brought | None:
        """Unless something has changed since."""
        own = self._brought
        return own if own is not None and own.start is self.start and own.length is self.length else None

    def bring(self, tables: Tensor, work: WorkPlan | None) -> None:
        """Notes starts and lengths that are on the device, int64 [2, S], and a plan of the attention over them."""
        self._brought = Brought(self.start, self.length, tables, work)

    def attend_among(self, query: Tensor, chunk: MaskedChunk, options: Mapping[str, Any]) -> Tensor:
        """Attention over all entries and over a chunk, of any number of queries. options: as in `attend`"""
        work = None if self._still_brought is None else self._still_brought.work
        return ragged_attention(query, Segments(*self.vectors, *self.brought), chunk, plan=work, **options)

    def attend(self, query: Tensor, options: Mapping[str, Any]) -> Tensor:
        """Attention over all entries, under the plan of the step where there is one. options: scale and so on."""
        if (placed := self.placed) is None or placed.work is None:
            return ragged_attention(query, self.segments, **options)
        return decode_attention(query, self.segments, plan=placed.work, **options).out

    def attend_beside(self, query: Tensor, chunk: MaskedChunk, options: Mapping[str, Any]) -> Tensor:
        """`attend`, over tokens of a chunk besides."""
        work = None if self.placed is None else self.placed.work
        return decode_attention(query, self.segments, chunk, plan=work, **options).out

    def attend_with_mass(self, query: Tensor, options: Mapping[str, Any], power: float) -> tuple[Tensor, Tensor]:
        """`attend`, and the attention that each row got: float32 [R], raised to a power and summed over the group."""
        work = None if self.placed is None else self.placed.work
        attended = decode_attention(query, self.segments, plan=work, with_mass=True, mass_power=power, **options)
        assert attended.mass is not None  # as it was asked for
        return attended.out, attended.mass

    @property
    def value_dim(self) -> int:
        """Of values as they come."""
        return self.values.shape[1]

    @property
    def head_dim(self) -> int:
        """The larger of the key's and the value's, as they come."""
        return max(self.like.shape[1], self.value_dim)

    @property
    def width(self) -> int:
        """Entries of the longest segment."""
        return max(self.length.tolist(), default=0)  # of a few numbers sooner than anything else

    @property
    def device(self) -> torch.device:
        return self.keys.device

    def padded_rows(self) -> Tensor:
        """int64 [S, width] on the device: the row of each entry, -1 behind a segment's length."""
        column = torch.arange(self.width, device=self.device)[None]
        start, length = on_device(torch.stack([self.start, self.length])[..., None], self.device)
        return torch.where(column < length, start + column, -1)

    def padded_positions(self) -> Tensor:
        """int64 [S, width] on the device, -1 behind a segment's length."""
        rows = self.padded_rows()
        return torch.where(rows < 0, -1, self.positions[rows.clamp(min=0)].long()) if rows.numel() else rows

    def padded_scores(self) -> Tensor | None:
        """float32 [S, width], -inf behind a segment's length; None where nothing is scored."""
        if self.scores is None:
            return None
        rows = self.padded_rows()
        if not rows.numel():
            return rows.float()
        return self.scores[rows.clamp(min=0)].masked_fill(rows < 0, float("-inf"))

    def owners(self) -> Tensor:
        """The segment of each row, int64 [R] on the device; of rows that are nobody's, any."""
        placed = self.placed
        if not self.is_shuffled and (placed is None or self.device.type == "cpu"):
            return each_entry(self.allocated, self.device)[0]
        starts = on_device(self.start, self.device) if placed is None else placed.starts
        if not self.is_shuffled:
            return owners_of(starts, len(self.positions))
        order = starts.argsort(stable=True)
        return order[owners_of(starts[order], len(self.positions))]

    def watch_queries(self, query: Tensor, chunk: Chunk) -> None:
        """Is shown the queries of a chunk before its tokens are kept. query: [B, num_q_heads, n, D], of its last n"""

    def lengths_on_device(self) -> Tensor:
        """int64 [S]."""
        return on_device(self.length, self.device) if self.placed is None else self.placed.lengths

    def append(self, key: Tensor, value: Tensor, position: Tensor, slot: Tensor, score: float) -> None:
        """Writes one entry per segment. key, value: [B, H, 1, dim]; position: int [S]; slot: int64 [S] in the segment.

        A slot behind the others needs an allocated row.
        """
        rows = (self.start.to(slot.device) + slot).to(self.device, non_blocking=True)
        self._put(key, value, position.to(self.device), rows, score)

    def write(
        self, key: Tensor, value: Tensor, step: LayerStep, placement: Placement, score: float, work: WorkPlan | None
    ) -> None:
        """`append`, where the tables behind it have been worked out."""
        self._put(key, value, placement.position, placement.row, score)
        self.pass_step(step)
        self.place(placement.start, placement.length, placement.seen, work)

    def place(self, starts: Tensor, lengths: Tensor, seen: Tensor, work: WorkPlan | None) -> None:
        """Notes tables that are on the device, as in `Placed`."""
        self._placed = Placed(self.length, starts, lengths, seen, work)

    def bookmark(self) -> Callable[[], None]:
        """Returns what takes the tables back to here; entries stay where they are."""
        own = dict(vars(self))
        return lambda: vars(self).update(own)

    def pass_step(self, step: LayerStep) -> None:
        """The host's part of `write`."""
        self.length, self.cursor, self._placed = step.length, step.cursor, None

    def _put(self, key: Tensor, value: Tensor, position: Tensor, rows: Tensor, score: float) -> None:
        arenas, numbers = self._numbers(position, score)
        append([*self._columns(), *arenas], rows, [*self._laid(key, value), *numbers])

    def _numbers(self, position: Tensor, score: float) -> tuple[list[Tensor], list[Tensor]]:
        """What has one number for each entry, and those of a new one. position: int64 [S]"""
        if self.scores is None:
            return [self.positions], [position]
        if self._new_scores is None or len(self._new_scores) != len(position):
            self._new_scores = torch.full_like(position, score, dtype=torch.float32)
        return [self.positions, self.scores], [position, self._new_scores]

    def _columns(self) -> tuple[Tensor, ...]:
        """The tensors that `columns` names."""
        return self.keys, self.values

    def _laid(self, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Keys and values [..., dim] as `columns` hold them."""
        return key, value

    def reserve(self, limit: Tensor) -> None:
        """Makes room for one more entry in every segment below `limit`. limit: int64 [S]."""
        growing = self.length < limit
        if bool((growing & (self.length == self.allocated)).any()):
            self.extend(limit)

    def extend(self, limit: Tensor) -> None:
        """Gives every segment free rows, up to `limit`. limit: int64 [S]."""
        self.relayout(torch.minimum(limit, self.length + self.slack(self.length)))

    @staticmethod
    def slack(length: Tensor) -> Tensor:
        """Rows that a segment of this length gets besides. length: int64 [S]."""
        return torch.from_numpy(np.maximum(length.numpy() // 32, LEAST_GROWTH))

    @classmethod
    def room(cls, length: Tensor, capacity: Tensor) -> Tensor:
        """Rows that segments of these lengths get in all, as far as they may grow. All int64 [S]."""
        own = length.numpy()
        return torch.from_numpy(np.maximum(np.minimum(own + cls.slack(length).numpy(), capacity.numpy()), own))

    def count(self, growing: Tensor) -> None:
        """Counts the entry that is written behind the others of these segments. growing: bool [S]."""
        self.length, self._placed = self.length + growing, None

    @property
    def beside(self) -> dict[str, Tensor]:
        """What is held besides the entries and belongs into a file, by name."""
        return {}

    def fill(
        self, length: Tensor, allocated: Tensor, entries: Mapping[str, Tensor], beside: Mapping[str, Tensor]
    ) -> None:
        """Makes its rows again. length, allocated: int64 [S], entries and rows of each segment.

        entries: those of all segments, one behind the other;  beside: both by name
        """
        self.start, self.length, self.allocated = allocated.cumsum(0) - allocated, length, allocated
        self.cursor, rows = torch.zeros_like(length), self.padded_rows()
        rows = rows[rows >= 0]
        for name, values in entries.items():
            free: Tensor = getattr(self, name)
            setattr(self, name, free.new_full((int(self.allocated.sum()), *free.shape[1:]), _FREE.get(name, 0)))
            getattr(self, name)[rows] = values.to(self.device)
        for name, own in self.beside.items():
            own.copy_(beside[name])
        self.layout, self.moves = object(), self.moves + 1

    def forget(self, settled: Tensor) -> None:
        """Tokens from these on have been taken back. settled: int64 [B]"""

    def fork(self) -> LayerArena:
        """A copy: entries in memory of their own, tables shared, as nobody writes into one."""
        own = {name: tensor.clone() for name, tensor in self.entries.items()}
        return copy_with(self, layout=object(), _placed=None, _brought=None, **own)

    def relayout(self, allocated: Tensor) -> None:
        """Moves every segment to an allocation of its own and turns the ring back. allocated: int64 [S]."""
        columns = torch.arange(self.width, device=self.device).expand(len(self.length), -1)
        if bool(self.cursor.any()):  # else all lie in order already
            length, cursor = on_device(torch.stack([self.length, self.cursor])[..., None], self.device)
            turned = self.num_pinned + (columns - self.num_pinned + cursor) % (length - self.num_pinned).clamp(min=1)
            columns = torch.where((columns < self.num_pinned) | (cursor == 0), columns, turned)
        self.replace(columns, self.length, allocated, self.padded_positions(), self.padded_scores())

    def replace(
        self,
        columns: Tensor,
        counts: Tensor,
        allocated: Tensor,
        positions: Tensor,
        scores: Tensor | None,
        chunk: Chunk | None = None,
    ) -> None:
        """Rebuilds the arena from some of its entries and of a chunk's tokens.

        columns: int64 [S, most] on the device; a column below `width` is an entry, `width + t` token t of the chunk
        counts, allocated: int64 [S], entries and rows of each segment
        positions, scores: int64 and float32 [S, width + n], of all of these; no scores where nothing is scored
        """
        sizes = allocated.numpy()
        start, rows = torch.from_numpy(sizes.cumsum() - sizes), int(sizes.sum())
        placed = on_device(torch.stack([start, counts, self.start]), self.device)
        chosen = Chosen(columns, placed[0], placed[1], placed[2], self.width)
        # free rows are read by policies: they hold finite keys and values, no position, and the lowest score
        free = rows > sum(counts.tolist())
        new = {name: _rows(tensor, rows, _FREE.get(name, 0) if free else None) for name, tensor in self.entries.items()}
        numbers = [(new[name], of) for name, of in (("positions", positions), ("scores", scores)) if of is not None]
        self._fill(new, chosen, chunk, numbers)
        self._take_over(new, stays=chunk is None)
        self.start, self.length, self.allocated = start, counts.clone(), allocated
        self.cursor, self._placed, self._brought = torch.zeros_like(counts), None, None

    def _fill(
        self, new: dict[str, Tensor], chosen: Chosen, chunk: Chunk | None, numbers: Sequence[tuple[Tensor, Tensor]]
    ) -> None:
        """Writes what was chosen of the entries and of a chunk into new columns. numbers: as in `rebuild`"""
        outs, held = [new[name] for name in self.columns], self._columns() if chosen.width else None
        fresh = None if chunk is None else (chunk.key.detach(), chunk.value.detach())
        rebuild(outs, chosen, held, fresh, numbers)

    def _take_over(self, columns: Mapping[str, Tensor], *, stays: bool) -> None:
        """New columns in the place of the old. stays: at the addresses of the old, where they are as many rows."""
        for name, new in columns.items():
            old: Tensor = getattr(self, name)
            stays = stays and old.shape == new.shape
            if stays:
                old.copy_(new)
            else:
                setattr(self, name, new)
        if not stays:
            self.layout, self.moves = object(), self.moves + 1

    def furnish(self, rows: int, idle: int) -> None:
        """Takes so many rows; every segment has the first `idle` of them."""
        for name, old in self.entries.items():
            setattr(self, name, old.new_full((rows, *old.shape[1:]), 0))
        self.start, self.cursor = torch.zeros_like(self.start), torch.zeros_like(self.cursor)
        self.length = self.allocated = torch.full_like(self.length, idle)
        self.layout, self._placed, self.is_shuffled = object(), None, True

    def seat(self, own: slice, other: LayerArena, start: Tensor, allocated: Tensor) -> None:
        """Entries of another arena, in their order, become those of some segments, which get these rows."""
        segment, offset = each_entry(other.length, other.device)
        into, source = on_device(torch.stack([start, other.start]), other.device)
        arrived = (*other._columns(), other.positions)
        for out, entries in zip((*self._columns(), self.positions), arrived, strict=True):
            compact(out, into[segment] + offset, entries, source[segment] + offset)
        count = len(self.start)
        for name, held in self.beside.items():  # a part for each segment, or for each sequence
            held[own.start * len(held) // count : own.stop * len(held) // count] = other.beside[name]
        self._set_segments(own, start=start, length=other.length, allocated=allocated, cursor=other.cursor)

    def vacate(self, own: slice, idle: int) -> None:
        """Takes the rows of some segments away; they have the first `idle` ones."""
        nothing = torch.zeros_like(self.start[own])
        self._set_segments(own, start=nothing, length=nothing + idle, allocated=nothing + idle, cursor=nothing)

    def move(self, own: slice, before: int, after: int, count: int) -> None:
        """Moves the rows of some segments, all in one piece, towards the beginning."""
        for column in (*self._columns(), self.positions):
            column[after : after + count] = column[before : before + count].clone()
        self._set_segments(own, start=self.start[own] + after - before)

    def _set_segments(self, own: slice, **tables: Tensor) -> None:
        for name, values in tables.items():
            table = getattr(self, name).clone()
            table[own] = values
            setattr(self, name, table)
        self._placed = None

    def take(self, segments: Tensor) -> None:
        """Keeps these segments, in this order and as often as they stand there. segments: int64 [S'] on the CPU."""
        for name in _TABLES:
            setattr(self, name, getattr(self, name)[segments])
        if self._new_scores is not None and len(self._new_scores) != len(segments):
            self._new_scores = None  # of as many, a recorded step may still read it
        self.relayout(self.allocated)


def _rows(like: Tensor, count: int, value: float | None) -> Tensor:
    """So many rows of a column, which hold this number; None where all of them are going to be written."""
    shape = count, *like.shape[1:]
    return like.new_empty(shape) if value is None else like.new_full(shape, value)
