"""Other capacities for what a store holds already, so that several tables can be tried on one prompt."""

from __future__ import annotations

from torch import Tensor

from kvpolicy.cache.rows import RowTables
from kvpolicy.cache.schedule import Fixed
from kvpolicy.cache.store import RaggedStore


def lower(store: RaggedStore, table: Tensor) -> None:
    """Fixes the capacities and evicts down to them by the scores that the entries have. table: int64 [L, H].

    A store that has scored its prompt and evicted nothing then holds what it would, had these been its capacities from
    the first token on: selection looks at scores and positions alone. Raises `BudgetError` below the policy's floor.
    """
    store.schedule = Fixed(table).with_floor(store.policy.num_sink_tokens + 1)
    store.rows = RowTables(store.schedule, None, store.batch_size)
    store.rows.grow(store.seen.tolist())
    own = slice(store.first_head, store.first_head + store.num_heads)
    for index, held in enumerate(store.layers):
        if held is not None:
            held.table = store.rows.layer(index)[:, own].clone()
            held.shrink()
