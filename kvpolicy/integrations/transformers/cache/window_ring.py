"""A sliding-window layer while tokens are decoded one by one.

transformers' own layer makes new tensors at each token, and counts in Python which entries are still seen. While tokens
are decoded in steps that may be recorded, its entries lie in a ring instead: a token's place is its position modulo the
window, so that it takes that of the one which leaves the window. Prompts, later turns and everything else find the
layer as transformers knows it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from kvpolicy_kernels.append import append
from kvpolicy_kernels.attention import decode_attention
from kvpolicy_kernels.segments import Segments
from torch import Tensor

from kvpolicy.cache.device_tables import on_device
from kvpolicy.cache.scoring import Scoring


@dataclass(slots=True, eq=False)
class StepCounts:
    """What a step goes by, at addresses that stay.

    columns: int64 [], before the token;  seen: int64 [B], tokens of each row before this one, padding excluded
    """

    columns: Tensor
    seen: Tensor
    _tables: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    def tables(self, num_heads: int, window: int) -> tuple[Tensor, Tensor, Tensor]:
        """The row of the new token, the first row and the length of each segment, int64 [S] each; made once a step."""
        key = num_heads, window
        if key not in self._tables:
            seen = self.seen.repeat_interleave(num_heads, output_size=len(self.seen) * num_heads)
            starts = torch.arange(len(seen), device=seen.device) * window
            self._tables[key] = starts + seen % window, starts, (seen + 1).clamp(max=window)
        return self._tables[key]

    def forget(self) -> None:
        """Another step begins."""
        self._tables.clear()


class WindowRing:
    """The ring of one layer.

    index:  of the layer in the model
    layer:  transformers' own
    window: tokens that a query sees, itself included
    entries: keys and values, [B, H, window, dim] each, while it is open, else None
    layout: another object whenever it lies elsewhere
    """

    def __init__(self, index: int, layer: Any, window: int) -> None:
        self.index, self.layer, self.window = index, layer, window
        self.entries: tuple[Tensor, Tensor] | None = None
        self.layout = object()

    def over(self, layer: Any) -> WindowRing:
        """That of a copy of the layer, made while this one is closed."""
        return WindowRing(self.index, layer, self.window)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.entries or ())

    def furnish(self, shape: tuple[int, int], dims: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        """Opens it for rows that are slots. shape: (slots, KV heads);  dims: of a key and of a value"""
        keys, values = (torch.zeros(*shape, self.window, dim, dtype=dtype, device=device) for dim in dims)
        self.entries, self.layout = (keys, values), object()

    def seat(self, row: int, other: WindowRing) -> None:
        """The only row of another ring, open too, becomes a row of this one."""
        for own, entries in zip(self._opened(), other._opened(), strict=True):
            own[row] = entries[0]

    def open(self, seen: Tensor) -> None:
        """Takes the entries over from the layer. seen: int64 [B] on the CPU, tokens of each row so far"""
        if self.entries is not None:
            return
        own = vars(self.layer)
        place = on_device(self._last(seen) + own["keys"].shape[2] - seen[:, None], own["keys"].device)
        self.entries, self.layout = (_taken(own["keys"], place), _taken(own["values"], place)), object()
        own |= {name: own[name][:, :, :0].clone() for name in ("keys", "values")}

    def close(self, seen: Tensor) -> None:
        """Gives the entries back to the layer, in their order. seen: as in `open`"""
        if self.entries is None:
            return
        own = vars(self.layer)
        columns = int(own["cumulative_length"])
        count = min(self.window - 1, columns)
        position = seen[:, None] - count + torch.arange(count)  # below 0 for padding, which no mask shows
        keys, values = self.entries
        place = on_device(position.clamp(min=0) % self.window, keys.device)
        own |= {"keys": _taken(keys, place), "values": _taken(values, place)}
        self.entries = None

    def count(self) -> None:
        """Counts a token."""
        own = vars(self.layer)
        own["cumulative_length"] = int(own["cumulative_length"]) + 1

    def forget(self) -> None:
        """Gives the entries up."""
        self.entries = None

    def reorder_cache(self, rows: Tensor) -> None:
        """Row i becomes what row `rows[i]` was, where it lies. rows: int64 [B]"""
        for entries in self._opened():
            entries.copy_(entries.index_select(0, rows.to(entries.device)))

    def write(self, key: Tensor, value: Tensor, counts: StepCounts) -> None:
        """Writes one token. key, value: [B, H, 1, dim]"""
        append(self._flat(), counts.tables(key.shape[1], self.window)[0], (key, value))

    def attend(self, query: Tensor, num_heads: int, scoring: Scoring, counts: StepCounts) -> Tensor:
        """query: [B, num_q_heads, 1, D] of the token that was written. Returns [B, num_q_heads, 1, Dv]."""
        _, starts, lengths = counts.tables(num_heads, self.window)
        return decode_attention(query, Segments(*self._flat(), starts, lengths), **scoring.options()).out

    def _flat(self) -> tuple[Tensor, Tensor]:
        keys, values = self._opened()
        return keys.flatten(0, 2), values.flatten(0, 2)

    def _opened(self) -> tuple[Tensor, Tensor]:
        assert self.entries is not None  # a step has opened it
        return self.entries

    def _last(self, seen: Tensor) -> Tensor:
        """int64 [B, window], for each place of the ring the last position before `seen` that belongs there."""
        last = seen[:, None] - 1
        return last - (last - torch.arange(self.window)) % self.window


def _taken(entries: Tensor, place: Tensor) -> Tensor:
    """Columns of each row, in this order; any of those there are where a place is outside. place: int64 [B, n]"""
    if not entries.shape[2]:
        return entries.new_zeros(*entries.shape[:2], place.shape[1], entries.shape[3])
    index = place.clamp(0, entries.shape[2] - 1)[:, None, :, None].expand(-1, entries.shape[1], -1, entries.shape[3])
    return entries.gather(2, index)
