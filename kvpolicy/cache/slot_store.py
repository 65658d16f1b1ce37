"""A store whose rows are slots: sequences join and leave while the others decode, and no address changes.

A sequence reads its prompt in a store of its own. Then its entries move into one extent of each layer's arena, which is
as large as its capacities, known from its prompt and the most tokens that it may be given. A step runs over all slots:
one without a sequence writes to a few rows that are nobody's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from kvpolicy_kernels.key_centre import KeyCentre
from torch import Tensor

from kvpolicy.budget.entry_format import Format
from kvpolicy.cache import schedule as schedules
from kvpolicy.cache.extents import Extents
from kvpolicy.cache.layer import StoreLayer
from kvpolicy.cache.scoring import scores_stay
from kvpolicy.cache.step import PlannedStep
from kvpolicy.cache.store import RaggedStore
from kvpolicy.errors import BudgetError
from kvpolicy.model.spec import ModelSpec
from kvpolicy.plugins.roles import EvictionPolicy


class SlotStore(RaggedStore):
    """Slots for sequences of one policy.

    spec:   the model's layers and heads
    policy: who is evicted
    slots:  sequences that are decoded at once
    rows:   of each layer, entries of all KV heads and sequences together
    entry_format, key_centres: in which they are kept, as for a `RaggedStore`

    Raises `BudgetError` for a policy that rescores while it decodes: in which order entries leave has to be known when
    a sequence is seated.
    """

    def __init__(
        self,
        spec: ModelSpec,
        policy: EvictionPolicy,
        *,
        slots: int,
        rows: Sequence[int],
        device: torch.device,
        dtype: torch.dtype,
        supplied: frozenset[str] = frozenset(),
        entry_format: Format = None,
        key_centres: Sequence[KeyCentre | None] | None = None,
    ) -> None:
        if not scores_stay(policy):
            raise BudgetError(
                f"{type(policy).__name__} changes its scores at every decoded token, which slots cannot: take a policy "
                "that scores the prompt alone, or decode each sequence over a cache of its own"
            )
        super().__init__(
            spec,
            schedules.unlimited(spec.table_shape),
            policy,
            batch_size=slots,
            supplied=supplied,
            entry_format=entry_format,
            key_centres=key_centres,
        )
        self._idle = self.protection.num_pinned + 1  # rows of a slot without a sequence
        for layer, count in enumerate(rows):
            self.open(layer, dtype, device).furnish(self._idle + count, self._idle, self.protection.end + 1)
        self._extents = [Extents(self._idle, self._idle + count) for count in rows]

    def has_room(self, capacities: Tensor) -> bool:
        """Whether a sequence of these capacities can be seated. capacities: int64 [L, H]"""
        return all(x.num_free >= need for x, need in zip(self._extents, capacities.sum(1).tolist(), strict=True))

    def could_ever(self, capacities: Tensor) -> bool:
        """Whether it could if no other sequence were there."""
        return all(x.last - x.first >= need for x, need in zip(self._extents, capacities.sum(1).tolist(), strict=True))

    def seat(self, slot: int, capacities: Tensor, store: RaggedStore) -> None:
        """Moves a sequence into a slot. `store`, of one sequence, is of no use afterwards.

        capacities: int64 [L, H], for which there is room
        """
        for layer, extents, own, table in zip(self._opened(), self._extents, store.layers, capacities, strict=True):
            assert own is not None  # its prompt has come
            size = int(table.sum())
            if extents.gap(size) is None:
                for owner, before, after, count in extents.pack():
                    layer.move(owner, before, after, count)
            layer.seat(slot, own, extents.take(slot, size), table)
        self._planned = PlannedStep()  # it was planned without this sequence

    def vacate(self, slot: int) -> None:
        """A sequence leaves; its rows are free."""
        for layer, extents in zip(self._opened(), self._extents, strict=True):
            extents.release(slot)
            layer.vacate(slot, self._idle, self.protection.end + 1)
        self._planned = PlannedStep()

    def _grow(self, layer: StoreLayer, seen: Tensor) -> None:
        """Capacities are known when a sequence is seated."""
