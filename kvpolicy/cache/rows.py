"""The capacity tables of the sequences in a batch. They grow with the tokens seen and never fall."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvpolicy.cache.schedule import Schedule
from kvpolicy.cache.split import RuntimeSplit


class RowTables:
    """One table for each sequence; sequences with the same history share one.

    tables:  int64 [L, H] of each sequence, None before its first tokens
    seen:    tokens of each sequence when its table was made
    """

    def __init__(self, schedule: Schedule, batch_size: int) -> None:
        self.schedule = schedule
        self.tables: list[Tensor | None] = [None] * batch_size
        self.seen = [0] * batch_size
        self.held: list[Tensor | None] = []  # before the forward that is being split at run time

    def grow(self, seen: Sequence[int]) -> None:
        """Brings every table up to the tokens seen; a smaller number (after a crop) leaves it as it is."""
        made: dict[tuple[int, int], Tensor] = {}
        for row, count in enumerate(seen):
            held = self.tables[row]
            if held is not None and count <= self.seen[row]:
                continue
            key = (id(held), count)
            if key not in made:
                made[key] = self.schedule.at(count, held)
            self.tables[row], self.seen[row] = made[key], count

    def grow_split(self, split: RuntimeSplit, seen: Sequence[int]) -> None:
        """As `grow`, keeping the proportions that were found at run time."""
        for row, count in enumerate(seen):
            if count > self.seen[row]:
                self.tables[row], self.seen[row] = split.grown(self._table(row), count), count

    def split(self, split: RuntimeSplit, scores: Sequence[Tensor], seen: Sequence[int]) -> None:
        """Fills in one more layer at run time. scores: float32 [B, H, n] of layers 0 to l."""
        if len(scores) == 1:
            self.held = list(self.tables)
        for row, count in enumerate(seen):
            held = self.held[row]
            now = self.tables[row] if len(scores) > 1 else None
            now = torch.zeros(self.schedule.shape, dtype=torch.int64) if now is None else now
            own = [layer[row : row + 1] for layer in scores]
            self.tables[row], self.seen[row] = split.at_layer(own, count, held, now), count

    def layer(self, layer: int, first_head: int, num_heads: int) -> Tensor:
        """int64 [B, num_heads], the capacities of some heads of one layer."""
        heads = slice(first_head, first_head + num_heads)
        return torch.stack([self._table(row)[layer, heads] for row in range(len(self.tables))])

    def take(self, rows: Sequence[int]) -> None:
        """Keeps these sequences, in this order."""
        self.tables = [self.tables[row] for row in rows]
        self.seen = [self.seen[row] for row in rows]

    def layers_up_to(self, layer: int) -> Tensor:
        """int64 [layer, B, H], copies of the tables of the layers before `layer`."""
        return torch.stack([self._table(row)[:layer] for row in range(len(self.tables))], 1)

    @property
    def nbytes(self) -> int:
        return sum({id(table): table.nbytes for table in self.tables if table is not None}.values())

    def _table(self, row: int) -> Tensor:
        table = self.tables[row]
        if table is None:
            raise ValueError(f"sequence {row} has no table yet: grow() comes first")
        return table
