"""What the ops over an arena are given: entries in ragged segments, and the tokens of this forward."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvpolicy_kernels.formats import Encoded, EntryFormat
from kvpolicy_kernels.key_centre import KeyCentre


@dataclass(frozen=True, slots=True, eq=False)
class Segments:
    """Entries of one layer in an arena, a segment for each KV head of each sequence.

    Segment i holds the entries of sequence `i // num_kv_heads` and KV head `i % num_kv_heads`: the rows `starts[i]` to
    `starts[i] + lengths[i] - 1` of every column. Rows outside every segment may hold anything.

    keys: [R, D];  values: [R, Dv]; a row is contiguous, and rows are any number of elements apart, so that keys and
        values may be parts of one arena's rows
    starts, lengths: int64 [B * num_kv_heads], on the device or the CPU; a length may be 0
    """

    keys: Tensor
    values: Tensor
    starts: Tensor
    lengths: Tensor

    def __len__(self) -> int:
        return self.starts.shape[0]

    def bounds(self) -> list[tuple[int, int]]:
        """(start, length) of every segment. Waits for the device where the tables lie there.

        Raises `ValueError` for a segment that leaves the arena.
        """
        num_rows = self.keys.shape[0]
        pairs = list(zip(self.starts.tolist(), self.lengths.tolist(), strict=True))
        for i, (start, length) in enumerate(pairs):
            if start < 0 or length < 0 or start + length > num_rows:
                raise ValueError(f"segment {i} of {length} rows from row {start} leaves the arena of {num_rows} rows")
        return pairs

    def on(self, device: torch.device) -> Segments:
        """The same with its tables there. Those of the CPU are checked, and copied in one transfer."""
        if self.lengths.device == device:
            return self
        self.bounds()
        starts, lengths = torch.stack([self.starts, self.lengths]).to(device, non_blocking=True)
        return replace(self, starts=starts, lengths=lengths)


@dataclass(frozen=True, slots=True, eq=False)
class BlockSegments:
    """Entries of one layer in blocks, which lie anywhere in an arena.

    A block has `sizes[h]` entries of each KV head h, from its row `offsets[h]` on. Entry j of a segment is the entry
    `j % sizes[h]` of the sequence's block `j // sizes[h]`.

    keys: [R, D];  values: [R, Dv]; rows as in `Segments`, and R below 2**31
    blocks: int [B, P], the numbers of each sequence's blocks in their order; those that no entry is in may be anything
    rows_per_block: block b begins at row `b * rows_per_block`
    offsets, sizes: int64 [num_kv_heads];  lengths: int64 [B * num_kv_heads], the entries of each segment
    """

    keys: Tensor
    values: Tensor
    blocks: Tensor
    rows_per_block: int
    offsets: Tensor
    sizes: Tensor
    lengths: Tensor

    def __len__(self) -> int:
        return self.lengths.shape[0]

    def gathered(self) -> Segments:
        """The same entries behind one another. Waits for the device."""
        lengths, sizes, offsets = (x.tolist() for x in (self.lengths, self.sizes, self.offsets))
        rows = []
        for segment, length in enumerate(lengths):
            sequence, head = divmod(segment, len(sizes))
            entry = torch.arange(length, device=self.keys.device)
            block = self.blocks[sequence].to(entry.device).long()[entry // sizes[head]]
            rows.append(block * self.rows_per_block + offsets[head] + entry % sizes[head])
        starts = self.lengths.cumsum(0) - self.lengths
        every = torch.cat(rows)
        return Segments(self.keys[every], self.values[every], starts, self.lengths)


@dataclass(frozen=True, slots=True, eq=False)
class EncodedSegments:
    """`Segments` whose rows are encoded.

    keys, values: of `entry_format`, whose bits are 8 or 4, with contiguous rows of codes and scales
    starts, lengths: as in `Segments`
    positions: int32 [R], of the entries' tokens; needed by a key centre, and beside exact copies
    key_centre: what the keys were encoded less of
    """

    keys: Encoded
    values: Encoded
    starts: Tensor
    lengths: Tensor
    entry_format: EntryFormat
    positions: Tensor | None = None
    key_centre: KeyCentre | None = None

    def __len__(self) -> int:
        return self.starts.shape[0]

    def decoded(self, dtype: torch.dtype, copies: ExactCopies | None = None) -> Segments:
        """The same entries as rows, with the copies in their places. Decodes the whole arena."""
        keys = self.entry_format.decode(self.keys, torch.float32)
        if (centre := self.key_centre) is not None:
            assert self.positions is not None  # has been checked
            for i, (start, length) in enumerate(self.bounds()):
                own = self.positions[start : start + length]
                keys[start : start + length] += centre.of(torch.full_like(own, i % centre.shape[0]), own)
        values = self.entry_format.decode(self.values, dtype)
        decoded = Segments(keys.to(dtype), values, self.starts, self.lengths)
        if copies is not None:
            assert self.positions is not None  # has been checked
            copies.write_into(decoded, self.positions)
        return decoded

    def bounds(self) -> list[tuple[int, int]]:
        """As those of `Segments`."""
        return self._words.bounds()

    def on(self, device: torch.device) -> EncodedSegments:
        """The same with its tables there. Those of the CPU are checked."""
        tables = self._words.on(device)
        return replace(self, starts=tables.starts, lengths=tables.lengths)

    @property
    def _words(self) -> Segments:
        return Segments(self.keys.codes, self.values.codes, self.starts, self.lengths)

    def check(self, op: str, dim: int) -> int:
        """The value dim. Raises `ValueError` for columns that are no rows of this format, with keys of `dim`."""
        count, per_word = len(self.keys.codes), self.entry_format.codes_in_word
        value_dim: int = self.values.codes.shape[-1] * per_word
        for name, column, width in (("keys", self.keys, dim), ("values", self.values, value_dim)):
            for part, tensor, shape, dtype in (
                ("codes", column.codes, (count, width // per_word), torch.int16),
                ("scales", column.scales, (count, 2), torch.float16),
            ):
                if tensor.shape != shape or tensor.dtype != dtype or tensor.stride(1) != 1:
                    raise ValueError(
                        f"{op}: expected {part} of {name} {list(shape)} of {dtype} with contiguous rows, got "
                        f"{list(tensor.shape)} of {tensor.dtype} with strides {list(tensor.stride())}"
                    )
        return value_dim


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """The tokens of this forward, which are not in the arena yet.

    key: [B, num_kv_heads, m, D];  value: [B, num_kv_heads, m, Dv], with any strides
    mask: bool [B or 1, 1, n, m], True is visible; None: query i of n sees token j iff `j <= i + m - n`
    """

    key: Tensor
    value: Tensor
    mask: Tensor | None = None

    def __len__(self) -> int:
        return self.key.shape[2]

    def of_queries(self, part: slice, count: int) -> Chunk:
        """What a part of `count` queries sees. part: with a start and a stop"""
        if self.mask is not None:
            return Chunk(self.key, self.value, self.mask[:, :, part])
        seen = max(0, len(self) - count + part.stop)
        return Chunk(self.key[:, :, :seen], self.value[:, :, :seen])

    def seen_by(self, count: int) -> Tensor:
        """The mask, also where it is the causal one. Returns bool [B or 1, 1, count, m]"""
        if self.mask is not None:
            return self.mask
        whole = torch.ones(count, len(self), dtype=torch.bool, device=self.key.device)
        return whole.tril(len(self) - count)[None, None]


@dataclass(frozen=True, slots=True, eq=False)
class ExactCopies:
    """What some of the entries were before they were encoded, which counts in their places: sinks, and the last ones.

    key: [B, num_kv_heads, N, D];  value: [B, num_kv_heads, N, Dv]; N is `num_sinks` and a ring: token p has slot p, or
        `num_sinks + p % (N - num_sinks)`
    positions: int32 [B, N], of the copies, -1 for an empty slot; the ring has those from some token on, and a copy
        belongs to an entry of every KV head
    """

    key: Tensor
    value: Tensor
    positions: Tensor
    num_sinks: int

    def hidden(self, positions: Tensor, b: int) -> Tensor:
        """Which of the entries of sequence b at these positions have copies that count. Returns bool [N]"""
        ring = self.positions[b, self.num_sinks :]
        since = torch.where(ring < 0, torch.iinfo(torch.int32).max, ring).min()
        return (positions < self.num_sinks) | (positions >= since)

    def slots(self, positions: Tensor) -> Tensor:
        """Of each position, its slot."""
        recent = self.positions.shape[1] - self.num_sinks
        return torch.where(positions < self.num_sinks, positions, self.num_sinks + positions % recent)

    def write_into(self, decoded: Segments, positions: Tensor) -> None:
        """Puts the copies in the places of the entries they belong to. positions: as in `EncodedSegments`"""
        for i, (start, length) in enumerate(decoded.bounds()):
            b, h = divmod(i, self.key.shape[1])
            rows = torch.arange(start, start + length, device=decoded.keys.device)
            rows = rows[self.hidden(positions[rows], b)]
            slots = self.slots(positions[rows])
            for own, copied in ((decoded.keys, self.key), (decoded.values, self.value)):
                own[rows] = copied[b, h, slots].to(own.dtype)

    def held(self) -> Segments:
        """The copies as entries of each segment, behind one another."""
        (batch, heads, slots), is_held = self.key.shape[:3], self.positions >= 0
        order = is_held.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, None, :, None]
        keys, values = (torch.take_along_dim(x, order, 2).flatten(0, 2) for x in (self.key, self.value))
        starts = torch.arange(0, batch * heads * slots, slots, device=keys.device)
        lengths = is_held.sum(1, keepdim=True).repeat(1, heads).flatten()
        return Segments(keys, values, starts, lengths)

    def before(self, chunk: Chunk, count: int) -> Chunk:
        """One chunk of both, for `count` queries: they see every copy, and of the chunk what they saw."""
        key, value = (torch.cat(pair, 2) for pair in ((self.key, chunk.key), (self.value, chunk.value)))
        masks = (self.positions >= 0)[:, None, None], chunk.seen_by(count)
        shape = len(key), 1, count
        return Chunk(key, value, torch.cat([mask.expand(*shape, mask.shape[3]) for mask in masks], 3))


def check_segments(
    op: str, query: Tensor, segments: Segments | BlockSegments, chunk: Chunk | None, sink_logits: Tensor | None
) -> int:
    """Returns the number of KV heads; raises `ValueError` for shapes and strides that do not fit."""
    dim, keys, values = query.shape[3], segments.keys, segments.values
    if keys.dim() != 2 or keys.shape[1] != dim or keys.stride(1) != 1:
        raise ValueError(
            f"{op}: query {list(query.shape)} needs keys [R, {dim}] with contiguous rows, got {list(keys.shape)} "
            f"with strides {list(keys.stride())}"
        )
    if values.dim() != 2 or values.shape[0] != keys.shape[0] or values.stride(1) != 1:
        raise ValueError(
            f"{op}: expected values [{keys.shape[0]}, Dv] with contiguous rows, got {list(values.shape)} "
            f"with strides {list(values.stride())}"
        )
    if isinstance(segments, Segments):
        return check_tables(op, query, values.shape[1], segments.starts, segments.lengths, chunk, sink_logits)
    if len(keys) >= 2**31:
        raise ValueError(f"{op}: blocks need an arena of less than 2**31 rows, got {len(keys)}")
    heads = check_tables(op, query, values.shape[1], segments.lengths, segments.lengths, chunk, sink_logits)
    blocks, offsets, sizes = segments.blocks, segments.offsets, segments.sizes
    if blocks.dim() != 2 or len(blocks) != len(query) or offsets.shape != (heads,) or sizes.shape != (heads,):
        raise ValueError(
            f"{op}: expected blocks [{len(query)}, P], and offsets and sizes [{heads}], got {list(blocks.shape)}, "
            f"{list(offsets.shape)} and {list(sizes.shape)}"
        )
    return heads


def check_encoded(
    op: str,
    query: Tensor,
    segments: EncodedSegments,
    chunk: Chunk | None,
    sink_logits: Tensor | None,
    copies: ExactCopies | None,
) -> int:
    """`check_segments` of entries that are encoded."""
    dim = query.shape[3]
    value_dim = segments.check(op, dim)
    heads = check_tables(op, query, value_dim, segments.starts, segments.lengths, chunk, sink_logits)
    centre, positions, rows = segments.key_centre, segments.positions, len(segments.keys.codes)
    if centre is not None and centre.shape != (heads, dim):
        raise ValueError(f"{op}: expected a key_centre of shape {(heads, dim)}, got {centre.shape}")
    needs = centre is not None or copies is not None
    if needs and (positions is None or positions.shape != (rows,) or positions.dtype != torch.int32):
        raise ValueError(
            f"{op}: copies and a key_centre need the positions of the entries, int32 [{rows}], got "
            + ("none" if positions is None else f"{list(positions.shape)} of {positions.dtype}")
        )
    if copies is not None:
        _check_copies(op, query, copies, heads, value_dim)
    return heads


def _check_copies(op: str, query: Tensor, copies: ExactCopies, num_kv_heads: int, value_dim: int) -> None:
    (batch, _, _, dim), slots = query.shape, copies.positions.shape[-1]
    shapes = ((batch, num_kv_heads, slots, dim), (batch, num_kv_heads, slots, value_dim), (batch, slots))
    parts = (copies.key, copies.value, copies.positions)
    if tuple(x.shape for x in parts) != shapes or not 0 <= copies.num_sinks < slots:
        raise ValueError(
            f"{op}: expected copies {[list(x) for x in shapes]} with less than {slots} sinks, "
            f"got {[list(x.shape) for x in parts]} with {copies.num_sinks}"
        )


def check_tables(
    op: str,
    query: Tensor,
    value_dim: int,
    starts: Tensor,
    lengths: Tensor,
    chunk: Chunk | None,
    sink_logits: Tensor | None,
) -> int:
    """What of `check_segments` is not about the columns."""
    batch, num_q_heads = query.shape[:2]
    count = starts.shape[0]
    if starts.shape != lengths.shape or count == 0 or count % batch or num_q_heads % (count // batch):
        raise ValueError(
            f"{op}: starts and lengths must be [{batch} * num_kv_heads], with a num_kv_heads that divides "
            f"{num_q_heads}, got {list(starts.shape)} and {list(lengths.shape)}"
        )
    if sink_logits is not None and sink_logits.shape != (num_q_heads,):
        raise ValueError(f"{op}: expected sink_logits [{num_q_heads}], got {list(sink_logits.shape)}")
    if chunk is not None:
        _check_chunk(op, query, chunk, count // batch, value_dim)
    return count // batch


def _check_chunk(op: str, query: Tensor, chunk: Chunk, num_kv_heads: int, value_dim: int) -> None:
    batch, _, n, dim = query.shape
    m, mask = len(chunk), chunk.mask
    if chunk.key.shape != (batch, num_kv_heads, m, dim):
        raise ValueError(
            f"{op}: expected the chunk's key {[batch, num_kv_heads, 'm', dim]}, got {list(chunk.key.shape)}"
        )
    if chunk.value.shape != (batch, num_kv_heads, m, value_dim):
        raise ValueError(
            f"{op}: expected the chunk's value {[batch, num_kv_heads, m, value_dim]}, got {list(chunk.value.shape)}"
        )
    if mask is not None and (mask.shape[0] not in (1, batch) or mask.shape[1:] != (1, n, m)):
        raise ValueError(f"{op}: expected the chunk's mask [1 or {batch}, 1, {n}, {m}], got {list(mask.shape)}")
