"""The capacity tables of the sequences in a batch. They grow with the tokens seen and never fall."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvpolicy.cache.chunk import Chunk
from kvpolicy.cache.copies import copy_with
from kvpolicy.cache.layer import StoreLayer
from kvpolicy.cache.schedule import Schedule
from kvpolicy.cache.split import RuntimeSplit
from kvpolicy.plugins.activations import LayerStatistics


class RowTables:
    """One table for each sequence; sequences with the same history share one.

    tables: int64 [L, H] of each sequence, None before its first tokens
    seen:   tokens of each sequence when its table was made
    """

    def __init__(self, schedule: Schedule, split: RuntimeSplit | None, batch_size: int) -> None:
        self.schedule, self.split = schedule, split
        self.tables: list[Tensor | None] = [None] * batch_size
        self.seen = [0] * batch_size
        self._before: list[Tensor | None] = []  # the tables at the start of a forward that is being split
        self._statistics: list[LayerStatistics] = []  # of the layers that it has split

    def grow(self, seen: Sequence[int]) -> None:
        """Brings every table up to the tokens seen; a smaller number (after a crop) leaves it as it is.

        What was split at run time keeps its proportions.
        """
        made: dict[tuple[int, int], Tensor] = {}
        for row, count in enumerate(seen):
            table = self.tables[row]
            if table is not None and count <= self.seen[row]:
                continue
            key = (id(table), count)  # by identity, as `split_layer` tells histories apart
            if key not in made and self.split is not None and table is not None:
                made[key] = self.split.grown(table, count)
            elif key not in made:
                made[key] = self.schedule.at(count, table)
            self.tables[row], self.seen[row] = made[key], count

    def split_layer(
        self, layer: int, scores: Sequence[Tensor], statistics: LayerStatistics, seen: Sequence[int]
    ) -> list[Tensor]:
        """Fills in layer l at run time.

        scores:     float32 [B, H, n] of layers 0 to l, or of l alone: see `at_layer`
        statistics: of layer l

        Returns int64 [B, H] of each of the layers 0 to l, under the scope "layer" of l alone: the others stay.
        """
        assert self.split is not None
        if not layer:
            # what no capacity falls below, while the tables change with each layer
            self._before, self._statistics = list(self.tables), []
        self._statistics.append(statistics)
        # under the scope "layer" there are scores of this layer alone
        all_statistics = [item.on(scores[0].device) for item in self._statistics[-len(scores) :]]
        alike: dict[tuple[int, int], list[int]] = {}
        for row, count in enumerate(seen):
            alike.setdefault((id(self._before[row]), count), []).append(row)
        for (_, count), rows in alike.items():
            before = self._before[rows[0]]
            now = [self._table(row) if layer else self.split.start(before) for row in rows]
            own = scores if len(rows) == len(seen) else [scored[rows] for scored in scores]
            own_statistics = [item.of_rows(rows) for item in all_statistics]
            tables = self.split.at_layer(layer, own, own_statistics, count, before, now)
            for row, table in zip(rows, tables, strict=True):
                self.tables[row], self.seen[row] = table, count
        if layer == self.schedule.shape[0] - 1:  # else old tables would stay, and count in `tensors`
            self._before, self._statistics = [], []
        return [self.layer(index) for index in range(layer if self.split.split_is_per_layer else 0, layer + 1)]

    def layer(self, layer: int) -> Tensor:
        """int64 [B, H], the capacities of one layer."""
        return torch.stack([self._table(row)[layer] for row in range(len(self.tables))])

    def fork(self) -> RowTables:
        """A copy. Tables are shared: nobody writes into one."""
        return copy_with(self, tables=list(self.tables), seen=list(self.seen))

    def take(self, rows: Sequence[int]) -> None:
        """Keeps these sequences, in this order."""
        self.tables = [self.tables[row] for row in rows]
        self.seen = [self.seen[row] for row in rows]

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        return [table for table in (*self.tables, *self._before) if table is not None]

    def _table(self, row: int) -> Tensor:
        table = self.tables[row]
        if table is None:
            raise ValueError(f"sequence {row} has no table yet: its first tokens come first")
        return table


def split_layers(
    rows: RowTables,
    layers: Sequence[StoreLayer],
    scores: Tensor | None = None,
    chunk: Chunk | None = None,
    statistics: LayerStatistics | None = None,
) -> None:
    """Run-time capacities of the last of these layers, and of the earlier ones, which shrink for it.

    layers: from the first on
    scores, chunk: float32 [S, width + n], of tokens that come in now; None splits by what is held
    statistics: of the last layer, None for an allocator that requires none
    """
    assert rows.split is not None
    *earlier, last = layers
    index, device = len(earlier), last.arena.device  # layers may lie on several
    if rows.split.split_is_per_layer:
        earlier = []
    compared = [*(layer.compared().to(device) for layer in earlier), last.compared(scores, chunk)]
    tables = rows.split_layer(index, compared, statistics or LayerStatistics(), last.settled.tolist())
    for layer, table in zip([*earlier, last], tables, strict=True):
        layer.allow(table)
    for layer in earlier:  # the last one evicts with its caller, who has its scores
        layer.shrink()
