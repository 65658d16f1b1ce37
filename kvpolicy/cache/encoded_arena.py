"""An arena whose keys and values are codes of 8 or 4 bits.

A token is encoded once, when it is written. From then on its codes move bit by bit, whatever entries are kept, and who
reads them is given decoded ones. On a GPU attention reads the codes, and the exact copies beside them, unless a mask
hides entries; so do the scores of a chunk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from kvpolicy_kernels.append_encoded import append_encoded
from kvpolicy_kernels.attention import WorkPlan
from kvpolicy_kernels.encode import encode
from kvpolicy_kernels.encoded_attention import encoded_attention, encoded_programs
from kvpolicy_kernels.formats import Encoded, EntryFormat
from kvpolicy_kernels.key_centre import KeyCentre
from kvpolicy_kernels.rebuild import rebuild
from kvpolicy_kernels.rebuild.op import Chosen
from kvpolicy_kernels.segments import Chunk as MaskedChunk
from kvpolicy_kernels.segments import EncodedSegments, ExactCopies, Segments
from torch import Tensor

from kvpolicy.cache.arena import LayerArena
from kvpolicy.cache.chunk import Chunk
from kvpolicy.cache.copies import copy_with
from kvpolicy.cache.device_tables import owners_of
from kvpolicy.cache.exact_block import ExactBlock
from kvpolicy.model.layer_spec import LayerSpec


class EncodedArena(LayerArena):
    """A `LayerArena` of codes.

    keys, values: int16 codes;  key_scales, value_scales: float16 [R, 2]; both as in `Encoded`
    exact: copies of the tokens that stay exact, None for a format without
    """

    columns: ClassVar[tuple[str, ...]] = ("keys", "key_scales", "values", "value_scales")
    key_scales: Tensor
    value_scales: Tensor

    def __init__(
        self,
        segments: tuple[int, int],
        shape: LayerSpec,
        dtype: torch.dtype,
        device: torch.device,
        *,
        entry_format: EntryFormat,
        num_sinks: int,
        num_pinned: int,
        scored: bool,
        key_centre: KeyCentre | None = None,
    ) -> None:
        """segments: (B, H)"""
        count, dims = segments[0] * segments[1], (shape.key_dim, shape.value_dim)
        super().__init__(count, *dims, dtype, device, num_pinned=num_pinned, scored=scored)
        self.entry_format, self.num_heads, recent = entry_format, segments[1], entry_format.exact_recent
        self.key_centre = key_centre if entry_format.centred else None
        self._like, self._value_dim = self.keys, shape.value_dim
        self.num_programs = encoded_programs(device)
        key, value = (torch.empty(*segments, 0, dim, dtype=dtype, device=device) for dim in dims)
        self.exact = ExactBlock(key, value, num_sinks, recent) if recent else None
        for name, column in zip(self.columns, self._laid(self.keys, self.values), strict=True):
            setattr(self, name, column)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return super().tensors | self.beside

    @property
    def beside(self) -> dict[str, Tensor]:
        return {} if self.exact is None else self.exact.tokens

    @property
    def like(self) -> Tensor:
        return self._like

    @property
    def value_dim(self) -> int:
        return self._value_dim

    @property
    def vectors(self) -> tuple[Tensor, Tensor]:
        (keys, values), dtype, centre = self._pairs(), self._like.dtype, self.key_centre
        decoded = self.entry_format.decode(keys, dtype if centre is None else torch.float32)
        if centre is not None and len(decoded):
            decoded = (decoded + centre.of(self.owners() % self.num_heads, self.positions)).to(dtype)
        pair = decoded.to(dtype), self.entry_format.decode(values, dtype)
        if self.exact is None or not len(decoded):
            return pair
        return self.exact.over(*pair, self.positions, self.owners())

    @property
    def reads_codes(self) -> bool:
        """Whether attention, and scores of it, read the codes themselves."""
        return self.device.type == "cuda"

    def attend_among(self, query: Tensor, chunk: MaskedChunk, options: Mapping[str, Any]) -> Tensor:
        if not self.reads_codes:
            return super().attend_among(query, chunk, options)
        coded, work = self._coded_by(self.brought), None if self._still_brought is None else self._still_brought.work
        return encoded_attention(query, coded, chunk, plan=work, copies=self._copies, **options).out

    def attend(self, query: Tensor, options: Mapping[str, Any]) -> Tensor:
        if not self.reads_codes:
            return super().attend(query, options)
        return encoded_attention(query, self._coded, plan=self._work, copies=self._copies, **options).out

    def attend_beside(self, query: Tensor, chunk: MaskedChunk, options: Mapping[str, Any]) -> Tensor:
        if not self.reads_codes:
            return super().attend_beside(query, chunk, options)
        return encoded_attention(query, self._coded, chunk, plan=self._work, copies=self._copies, **options).out

    def attend_with_mass(self, query: Tensor, options: Mapping[str, Any], power: float) -> tuple[Tensor, Tensor]:
        if not self.reads_codes:
            return super().attend_with_mass(query, options, power)
        attended = encoded_attention(
            query, self._coded, plan=self._work, copies=self._copies, with_mass=True, mass_power=power, **options
        )
        assert attended.mass is not None  # as it was asked for
        return attended.out, attended.mass

    @property
    def _work(self) -> WorkPlan | None:
        return None if self.placed is None else self.placed.work

    @property
    def _coded(self) -> EncodedSegments:
        placed = self.placed
        return self._coded_by((self.start, self.length) if placed is None else (placed.starts, placed.lengths))

    def _coded_by(self, tables: tuple[Tensor, Tensor]) -> EncodedSegments:
        """tables: starts and lengths, on any device"""
        return EncodedSegments(*self._pairs(), *tables, self.entry_format, self.positions, self.key_centre)

    @property
    def read_segments(self) -> tuple[Segments | EncodedSegments, ExactCopies | None]:
        if not self.reads_codes:
            return super().read_segments
        return self._coded_by(self.brought), self._copies

    @property
    def _copies(self) -> ExactCopies | None:
        if (exact := self.exact) is None:
            return None
        return ExactCopies(exact.keys, exact.values, exact.positions, exact.num_sinks)

    def replace(
        self,
        columns: Tensor,
        counts: Tensor,
        allocated: Tensor,
        positions: Tensor,
        scores: Tensor | None,
        chunk: Chunk | None = None,
    ) -> None:
        super().replace(columns, counts, allocated, positions, scores, chunk)
        if chunk is not None and self.exact is not None:
            self.exact.add(chunk)

    def fork(self) -> EncodedArena:
        copy: EncodedArena = super().fork()  # type: ignore[assignment]  # of its own class
        return copy_with(copy, exact=None if self.exact is None else self.exact.fork())

    def take(self, segments: Tensor) -> None:
        super().take(segments)
        if self.exact is not None:
            self.exact.take(segments[:: self.num_heads] // self.num_heads)

    def forget(self, settled: Tensor) -> None:
        if self.exact is not None:
            self.exact.forget(settled)

    def _put(self, key: Tensor, value: Tensor, position: Tensor, rows: Tensor, score: float) -> None:
        arenas, numbers = self._numbers(position, score)
        append_encoded(
            self._pairs(),
            rows,
            [key, value],
            self.entry_format,
            positions=position,
            arenas=arenas,
            numbers=numbers,
            copies=self._copies,
            key_centre=self.key_centre,
        )

    def _pairs(self) -> tuple[Encoded, Encoded]:
        return Encoded(self.keys, self.key_scales), Encoded(self.values, self.value_scales)

    def _columns(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name) for name in self.columns)

    def _laid(self, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        keys, values = encode([key, value], self.entry_format)
        return *keys, *values

    def _fill(
        self, new: dict[str, Tensor], chosen: Chosen, chunk: Chunk | None, numbers: Sequence[tuple[Tensor, Tensor]]
    ) -> None:
        if chunk is not None:  # only what is kept is encoded
            tokens = chunk.key.detach(), chunk.value.detach()
            kept = [x.new_zeros(len(new["positions"]), x.shape[-1]) for x in tokens]
            rebuild(kept, chosen, None, tokens, numbers)
            if self.key_centre is not None:
                heads = owners_of(chosen.starts, len(kept[0])) % self.num_heads
                kept[0] = kept[0].float() - self.key_centre.of(heads, new["positions"])
            new |= zip(self.columns, self._laid(*kept), strict=True)
            numbers = ()
        rebuild([new[name] for name in self.columns], chosen, self._columns() if chosen.width else None, None, numbers)
