"""What a store holds and what it weighs, read from its layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvpolicy.cache.layer import StoreLayer
from kvpolicy.cache.rows import RowTables
from kvpolicy.cache.schedule import Schedule
from kvpolicy.cache.scoring import NotANumber
from kvpolicy.cache.split import RuntimeSplit
from kvpolicy.cache.step import PlannedStep, StepTables
from kvpolicy.model.spec import ModelSpec


class Accounts:
    """The accounts of a `RaggedStore`.

    layers: one for each budgeted layer, None where nothing has come
    """

    spec: ModelSpec
    batch_size: int
    num_heads: int
    rows: RowTables
    layers: list[StoreLayer | None]
    _planned: PlannedStep
    _tables: StepTables
    _wrong: NotANumber

    @property
    def schedule(self) -> Schedule:
        """Capacities over the tokens seen."""
        return self.rows.schedule

    @property
    def split(self) -> RuntimeSplit | None:
        """What splits them at run time."""
        return self.rows.split

    @property
    def seen(self) -> Tensor:
        """int64 [B], tokens of each sequence so far, padding excluded."""
        for layer in self._opened():
            return layer.seen
        return torch.zeros(self.batch_size, dtype=torch.int64)

    @property
    def lengths(self) -> Tensor:
        """int64 [L, B, H], entries held now; pending tokens included."""
        return self._tabulate(lambda layer: layer.num_held)

    @property
    def capacities(self) -> Tensor:
        """int64 [L, B, H], entries allowed now, protected spans included; `UNLIMITED` where nothing is evicted."""
        return self._tabulate(lambda layer: layer.capacity)

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor held, tables included; memory that several tensors share counts once."""
        tensors = [tensor for layer in self._opened() for tensor in layer.tensors.values()]
        tensors += [*self.rows.tensors, *self._planned.tensors, *self._tables.tensors, *self._wrong.tensors]
        storages = {x.data_ptr(): x.nbytes() for x in (tensor.untyped_storage() for tensor in tensors)}
        return sum(storages.values())

    @property
    def dense_nbytes(self) -> int:
        """Bytes that keeping every token seen would take, padding excluded."""
        itemsize = next((layer.arena.like.element_size() for layer in self._opened()), 0)
        return int(self.seen.sum()) * self.spec.num_budgeted_layers * self.num_heads * self.spec.entry_bytes(itemsize)

    def _opened(self) -> list[StoreLayer]:
        return [layer for layer in self.layers if layer is not None]

    def _tabulate(self, of: Callable[[StoreLayer], Tensor]) -> Tensor:
        shape = (self.batch_size, self.num_heads)
        empty = torch.zeros(shape, dtype=torch.int64)
        return torch.stack([empty if layer is None else of(layer).view(shape) for layer in self.layers])
