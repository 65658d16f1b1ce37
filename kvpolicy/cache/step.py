"""One decoded token in every layer of a store.

What a token does to the tables follows from counts alone, so all layers' tables are worked out at once, on the host,
and go to the device in one copy: a layer then writes its entry and attends, and no more of a step happens once a layer.
Where scores change from step to step, a layer besides looks for the entry that a full segment gives up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from kvpolicy_kernels.attention import WorkPlan, plan_work
from torch import Tensor

from kvpolicy.cache.arena import LayerArena, on_device
from kvpolicy.cache.layer import StoreLayer


@dataclass(frozen=True, slots=True, eq=False)
class LayerStep:
    """What the token changes in one layer.

    before: the lengths that this was worked out from, by identity: whatever else happens to a layer replaces them
    seen, evicted_at: int64 [B], as in `StoreLayer`, behind the token
    length, cursor:   int64 [S], as in `LayerArena`, behind the token
    searches: whether the row of a full segment is still to be looked for
    start, placed_length, row, position, placed_seen: int64 [S] on the layer's device; where the entry goes (-1: to the
        row that is to be looked for), its position, and `seen`
    work:   how the device shares the attention of this step, None where that is not planned
    """

    before: Tensor
    seen: Tensor
    evicted_at: Tensor
    length: Tensor
    cursor: Tensor
    searches: bool
    start: Tensor
    placed_length: Tensor
    row: Tensor
    position: Tensor
    placed_seen: Tensor
    work: WorkPlan | None


class PlannedStep:
    """A step that is under way: it is handed out layer by layer, in their order, and forgotten behind the last."""

    def __init__(self, steps: Sequence[LayerStep]) -> None:
        self._steps, self._due = steps, 0

    def next(self, layer: int, entries: StoreLayer) -> LayerStep | None:
        """What the token changes in a layer; None where it was not planned, or for a layer out of turn."""
        if layer != self._due or not self._steps or self._steps[layer].before is not entries.arena.length:
            return None
        step = self._steps[layer]
        self._due += 1
        if self._due == len(self._steps):
            self._steps = ()
        return step


def plan_step(layers: Sequence[StoreLayer | None], *, evict: bool) -> list[LayerStep]:
    """The step of each layer; none where the layers do not all stand alike.

    evict: whether a full segment gives an entry up. Makes room where there is none, and turns entries into rings.
    """
    opened = [layer for layer in layers if layer is not None and layer.is_ready]
    if len(opened) < len(layers):
        return []
    first = opened[0]
    if not all(layer.seen is first.seen or torch.equal(layer.seen, first.seen) for layer in opened):
        return []
    seen = first.seen + 1
    limit = torch.stack([layer.limit(evict) for layer in opened])
    # both move entries, so they come before the tables are read
    for layer, own in zip(opened, limit, strict=True):
        layer.make_ring(own)
    _reserve(opened, limit)
    start, length, cursor = _stacked([layer.arena for layer in opened], "start", "length", "cursor")
    evicted_at = torch.stack([layer.evicted_at for layer in opened])
    full = length >= limit
    after, row, searches = length + ~full, start + length, [False] * len(opened)
    if first.knows_order:
        num_pinned = first.arena.num_pinned
        row = torch.where(full, start + num_pinned + cursor, row)
        ring = (length - num_pinned).clamp(min=1)  # before all pinned entries have come there is none to go round
        cursor = torch.where(full, (cursor + 1) % ring, cursor)
    else:
        row, searches = row.masked_fill(full, -1), full.any(1).tolist()
    loses = full.view(len(opened), len(seen), -1).any(2)
    evicted_at = torch.where(loses, seen, evicted_at)  # this token included: it cannot be taken back either
    seen_each = seen.repeat_interleave(first.num_heads).expand_as(start)
    on_host = torch.stack([start, after, row, seen_each - 1, seen_each])
    arenas = [layer.arena for layer in opened]
    places = {device: _placed(on_host, device, arenas[0].head_dim) for device in {arena.device for arena in arenas}}
    own = zip(evicted_at.unbind(), after.unbind(), cursor.unbind(), searches, strict=True)
    return [
        LayerStep(arena.length, seen, *tables, *places[arena.device][i])
        for i, (arena, tables) in enumerate(zip(arenas, own, strict=True))
    ]


def _placed(tables: Tensor, device: torch.device, head_dim: int) -> list[tuple[Any, ...]]:
    """The tables of each layer on a device, and how its programs share the attention. tables: int64 [5, L, S]."""
    moved = on_device(tables, device)
    work: list[WorkPlan | None] = [None] * tables.shape[1]
    if device.type == "cuda":  # one launch for all layers
        plan = plan_work(moved[1], head_dim=head_dim)
        work = [plan.layer(index) for index in range(tables.shape[1])]
    return list(zip(*(table.unbind() for table in moved.unbind()), work, strict=True))


def _stacked(arenas: Sequence[LayerArena], *names: str) -> tuple[Tensor, ...]:
    """These tables of all arenas, int64 [L, S] each."""
    tables = torch.stack([getattr(arena, name) for name in names for arena in arenas])
    return tables.view(len(names), len(arenas), -1).unbind()


def _reserve(layers: Sequence[StoreLayer], limit: Tensor) -> None:
    """Room for one more entry in every segment below its limit. limit: int64 [L, S]."""
    arenas = [layer.arena for layer in layers]
    length, allocated, cursor = _stacked(arenas, "length", "allocated", "cursor")
    # behind a ring that has turned there is no place for one more: it would leave before entries that are older
    short = ((length < limit) & ((length == allocated) | (cursor > 0))).any(1)
    if bool(short.any()):
        for index in short.nonzero()[:, 0].tolist():
            arenas[index].extend(limit[index])
