"""Other capacities for what a store holds already, so that several tables can be tried on one prompt."""

from __future__ import annotations

from torch import Tensor

from kvpolicy.cache.rows import RowTables, split_layers
from kvpolicy.cache.schedule import Fixed
from kvpolicy.cache.split import RuntimeSplit
from kvpolicy.cache.store import RaggedStore
from kvpolicy.errors import BudgetError
from kvpolicy.plugins.roles import BudgetAllocator


def lower(store: RaggedStore, table: Tensor, allocator: BudgetAllocator | None = None) -> None:
    """Fixes the capacities and evicts down to them by the scores that the entries have.

    table:     int64 [L, H]
    allocator: splits the table's total at run time instead, layer by layer as a prompt would

    A store that has scored its prompt and evicted nothing then holds what it would, had these been its capacities from
    the first token on: selection looks at scores and positions alone.

    Raises `BudgetError` below the policy's floor, and for a table of another shape.
    """
    if tuple(table.shape) != store.spec.table_shape:
        raise BudgetError(f"the table has shape {tuple(table.shape)}, the model has {store.spec.table_shape}")
    floor = store.policy.least_capacity
    store.schedule = Fixed(table).with_floor(floor)
    store.split = None if allocator is None else RuntimeSplit(allocator, store.schedule, floor)
    store.rows = RowTables(store.schedule, store.split, store.batch_size)
    if store.split is not None:
        layers = [held for held in store.layers if held is not None]
        for index, layer in enumerate(layers):
            split_layers(store.rows, layers[: index + 1])
            layer.shrink()
        return
    store.rows.grow(store.seen.tolist())
    own = slice(store.first_head, store.first_head + store.num_heads)
    for index, held in enumerate(store.layers):
        if held is not None:
            held.table = store.rows.layer(index)[:, own].clone()
            held.shrink()
