"""Other capacities for what a store holds already, so that several tables can be tried on one prompt."""

from __future__ import annotations

from torch import Tensor

from kvpolicy.cache.schedule import ByLength, Fixed
from kvpolicy.cache.split import RuntimeSplit
from kvpolicy.cache.store import RaggedStore
from kvpolicy.errors import BudgetError
from kvpolicy.plugins.roles import BudgetAllocator


def lower(store: RaggedStore, table: Tensor | ByLength, allocator: BudgetAllocator | None = None) -> None:
    """Fixes the capacities and evicts down to them.

    table:     int64 [L, H], or one for each length of a prompt
    allocator: splits the table's total at run time instead, layer by layer as a prompt would

    Raises `BudgetError` below the policy's floor, for a table of another shape, and for an allocator that requires
    statistics of a prompt's attention, which is gone.
    """
    if allocator is not None and allocator.requires:
        raise BudgetError(
            f"{type(allocator).__name__} requires {', '.join(sorted(allocator.requires))} of the prompt's attention, "
            "which is gone: make the store with this allocator"
        )
    if tuple(table.shape) != store.spec.table_shape:
        raise BudgetError(f"the table has shape {tuple(table.shape)}, the model has {store.spec.table_shape}")
    floor = store.least_capacity
    schedule = (table if isinstance(table, ByLength) else Fixed(table)).with_floor(floor)
    store.rebudget(schedule, None if allocator is None else RuntimeSplit(allocator, schedule, floor))
