"""One decoded token in every layer of a store.

What a token does to the tables follows from counts alone, so all layers' tables are worked out at once, on the host,
and go to the device in one copy: a layer then writes its entry and attends, and no more of a step happens once a layer.
Where scores change from step to step, a layer besides looks for the entry that a full segment gives up.

The copy goes to an address that stays. So a CUDA graph that holds what the layers do on the device serves every token:
each is worked out here, its tables are copied, and the graph is replayed.

The tables are worked out by numpy. torch shares operations over 32768 numbers and more between threads, and to wake
them took 8 ms an operation on 32 cores with other processes beside it: a token of 141 sequences took 240 ms, not 36.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
from kvpolicy_kernels.attention import WorkPlan, plan_work
from numpy.typing import NDArray
from torch import Tensor

from kvpolicy.cache.arena import LayerArena
from kvpolicy.cache.layer import StoreLayer
from kvpolicy.cache.schedule import UNLIMITED
from kvpolicy.cache.tail import Tail

Table = NDArray[np.int64]


class Placement(NamedTuple):
    """Where a layer's entry goes, int64 [S] each on its device.

    row: -1 where it is still to be looked for;  length, seen: behind the token
    """

    start: Tensor
    length: Tensor
    row: Tensor
    position: Tensor
    seen: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LayerStep:
    """What the token changes in one layer.

    before: the lengths that this was worked out from, by identity: whatever else happens to a layer replaces them
    seen, evicted_at: int64 [B], as in `StoreLayer`, behind the token
    length, cursor:   int64 [S], as in `LayerArena`, behind the token
    searches: whether the row of a full segment is still to be looked for
    on_device: int64 [5, L, S] on the layer's device, what `placement` names, of each layer
    index:    of this one in it
    """

    before: Tensor
    seen: Tensor
    evicted_at: Tensor
    length: Tensor
    cursor: Tensor
    searches: bool
    on_device: Tensor
    index: int

    @property
    def placement(self) -> Placement:
        """Made when it is asked for: the replay of a graph does without."""
        return Placement(*self.on_device[:, self.index].unbind())

    def is_next(self, entries: StoreLayer) -> bool:
        """Whether nothing has happened to the layer since."""
        # tokens that are pending change no table, but come before the one that was planned
        return self.before is entries.arena.length and entries.is_ready


@dataclass(frozen=True, slots=True, eq=False)
class TailStep:
    """What a token on top of the entries changes in one layer.

    before: the tail that this was worked out from, by identity: whatever else happens to a layer replaces it
    seen: int64 [B], as in `StoreLayer`, behind the token
    positions: int64 [B, n + 1], of the tail behind the token
    """

    before: Tail
    seen: Tensor
    positions: Tensor

    def is_next(self, entries: StoreLayer) -> bool:
        """Whether nothing has happened to the layer since."""
        return self.before is entries.pending


class StepTables:
    """The tables of the token under way: of all layers on the host, and on each device at an address that stays."""

    def __init__(self) -> None:
        self._placed: dict[torch.device, Tensor] = {}
        self._stacks: dict[str, tuple[Sequence[Tensor], Tensor]] = {}

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        return [*self._placed.values(), *(x for parts, whole in self._stacks.values() for x in (*parts, whole))]

    def forget(self) -> None:
        """The layers have other rows now, and these tables would only take memory."""
        self._stacks.clear()

    def stacked(self, name: str, parts: Sequence[Tensor]) -> Table:
        """A table of each layer in one, which is not put together again where they are those of the token before.

        parts: [...] each, on the host; nobody writes into them
        """
        before, whole = self._stacks.get(name, ((), None))
        if whole is None or len(before) != len(parts) or not all(map(operator.is_, before, parts)):
            whole = torch.from_numpy(np.stack([part.numpy() for part in parts]))
            self._stacks[name] = parts, whole
        return whole.numpy()

    def unbound(self, name: str, table: Table) -> tuple[Tensor, ...]:
        """The table of each layer, for which `stacked` will give the whole."""
        whole = torch.from_numpy(table)
        parts: tuple[Tensor, ...] = whole.unbind()
        self._stacks[name] = parts, whole
        return parts

    def place(self, tables: Sequence[Table], devices: Collection[torch.device]) -> dict[torch.device, Tensor]:
        """int64 [len(tables), ...] on each device, none of which is waited for; those of the token before are gone."""
        pinned = any(device.type == "cuda" for device in devices)
        on_host = torch.empty(len(tables), *tables[0].shape, dtype=torch.int64, pin_memory=pinned)
        np.stack(tables, out=on_host.numpy())
        return {device: self._copied(on_host, device) for device in devices}

    def _copied(self, on_host: Tensor, device: torch.device) -> Tensor:
        if device.type != "cuda":
            return on_host.to(device)
        placed = self._placed.get(device)
        if placed is None or placed.shape != on_host.shape:
            with torch.inference_mode(False):  # else it could not be written to outside of that mode
                placed = self._placed[device] = torch.empty_like(on_host, device=device, pin_memory=False)
        return placed.copy_(on_host, non_blocking=True)


class PlannedStep:
    """A step that is under way: it is handed out layer by layer, in their order, and forgotten behind the last.

    steps:   of each layer; empty where nothing is planned
    lengths: int64 [L, S] on each device behind the token; L counts the layers of all devices
    """

    def __init__(
        self,
        steps: Sequence[LayerStep] | Sequence[TailStep] = (),
        lengths: Mapping[torch.device, Tensor] | None = None,
    ) -> None:
        self._steps, self._lengths, self._due = steps, lengths or {}, 0
        self._work: dict[torch.device, WorkPlan] = {}

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        own = [getattr(step, field.name) for step in self._steps for field in fields(step)]
        work = [plan.units for plan in self._work.values()]  # all of it is one tensor
        return [*(x for x in own if isinstance(x, Tensor)), *self._lengths.values(), *work]

    @property
    def is_on_top(self) -> bool:
        """Whether the token goes on top of the entries."""
        return bool(self._steps) and isinstance(self._steps[0], TailStep)

    def is_for(self, first: StoreLayer) -> bool:
        """Whether the next token is planned, and nothing has changed since. first: the first layer"""
        return self.has(0, first)

    def has(self, layer: int, entries: StoreLayer) -> bool:
        """Whether it is this layer's turn, and nothing has happened to it since."""
        return layer == self._due and bool(self._steps) and self._steps[layer].is_next(entries)

    def next(self, layer: int, entries: StoreLayer) -> LayerStep | TailStep | None:
        """What the token changes in a layer; None where it was not planned, or for a layer out of turn."""
        if not self.has(layer, entries):
            return None
        step = self._steps[layer]
        self._due += 1
        if self._due == len(self._steps):
            self._steps = ()
        return step

    def bookmark(self) -> Callable[[], None]:
        """Returns what takes it back to here."""
        own = dict(vars(self), _work=dict(self._work))
        return lambda: vars(self).update(own)

    def work(self, layer: int, arena: LayerArena) -> WorkPlan | None:
        """How the programs of the device share the attention of a layer, worked out there in one launch for all.

        None on the CPU.
        """
        device = arena.device
        if device.type != "cuda":
            return None
        if device not in self._work:
            self._work[device] = plan_work(
                self._lengths[device], head_dim=arena.head_dim, num_programs=arena.num_programs
            )
        return self._work[device].layer(layer)


def plan_step(layers: Sequence[StoreLayer | None], tables: StepTables, *, evict: bool, grows: bool) -> PlannedStep:
    """The step of each layer; none where the layers do not all stand alike.

    evict: whether a full segment gives an entry up. Makes room where there is none, and turns entries into rings.
    grows: whether limits rise with the tokens seen, so that segments get room beyond them
    """
    opened = [layer for layer in layers if layer is not None and layer.is_ready]
    if len(opened) < len(layers):
        return PlannedStep()
    first = opened[0]
    if not all(layer.seen is first.seen or torch.equal(layer.seen, first.seen) for layer in opened):
        return PlannedStep()
    seen = first.seen + 1
    limit = most = _limits(opened, tables, seen, evict=evict)
    if (end := first.protection.end) and end > int(first.seen.min()):  # tokens of a span will come on top
        most = _limits(opened, tables, seen.clamp(min=end), evict=evict)
    # both move entries, so they come before the tables are read
    for layer, own in zip(opened, torch.from_numpy(limit), strict=True):
        layer.make_ring(own)
    arenas = [layer.arena for layer in opened]
    _reserve(arenas, tables, limit, most, grows=grows)
    start, length, cursor = (_stacked(arenas, tables, name) for name in ("start", "length", "cursor"))
    evicted_at = tables.stacked("evicted_at", [layer.evicted_at for layer in opened])
    full = length >= limit
    after, row = length + ~full, start + length
    if first.has_order:
        num_pinned, searches = first.arena.num_pinned, [False] * len(opened)
        row = np.where(full, start + num_pinned + cursor, row)
        ring = np.maximum(length - num_pinned, 1)  # before all pinned entries have come there is none to go round
        cursor = np.where(full, np.where(cursor + 1 < ring, cursor + 1, 0), cursor)
    else:
        # on a GPU always, so that every token is the same launches
        row, is_full = np.where(full, -1, row), np.any(full, axis=1)
        searches = (is_full | first.arena.like.is_cuda).tolist()
    loses = full.reshape(len(opened), len(seen), -1).any(2)
    evicted_at = np.where(loses, seen.numpy(), evicted_at)  # this token included: it cannot be taken back either
    seen_each = np.broadcast_to(seen.numpy().repeat(first.num_heads), start.shape)
    placed = tables.place((start, after, row, seen_each - 1, seen_each), {arena.device for arena in arenas})
    evictions, lengths = tables.unbound("evicted_at", evicted_at), tables.unbound("length", after)
    behind = zip(evictions, lengths, tables.unbound("cursor", cursor), searches, strict=True)
    steps = [
        LayerStep(arena.length, seen, evicted, own, turn, does_search, placed[arena.device], index)
        for index, (arena, (evicted, own, turn, does_search)) in enumerate(zip(arenas, behind, strict=True))
    ]
    return PlannedStep(steps, {device: x[1] for device, x in placed.items()})


def _limits(layers: Sequence[StoreLayer], tables: StepTables, settled: Tensor, *, evict: bool) -> Table:
    """[L, S], as in `StoreLayer.limit`."""
    if evict and not layers[0].protection.spans:  # the same as long as no budget grows
        return tables.stacked("table", [layer.table for layer in layers]).reshape(len(layers), -1)
    return np.stack([layer.limit(evict, settled).numpy() for layer in layers])


def _stacked(arenas: Sequence[LayerArena], tables: StepTables, name: str) -> Table:
    """[L, S], a table of all arenas by its name."""
    return tables.stacked(name, [getattr(arena, name) for arena in arenas])


def _reserve(arenas: Sequence[LayerArena], tables: StepTables, limit: Table, most: Table, *, grows: bool) -> None:
    """Room for one more entry in every segment below its limit.

    limit, most: [L, S], entries allowed now, and once all protected spans have come
    grows: then also for all up to a limit that is known, so that entries move when limits rise and at no other token
    """
    length, allocated, cursor = (_stacked(arenas, tables, name) for name in ("length", "allocated", "cursor"))
    below, known = length < limit, np.where(most < UNLIMITED, most, 0)
    cramped = below & (length == allocated)
    if grows:
        cramped |= below & (known > allocated)
    # behind a ring that has turned there is no place for one more: it would leave before entries that are older
    turned = below & (cursor > 0)
    if not (cramped | turned).any():
        return
    for arena, own, least, is_cramped, is_turned in zip(
        arenas,
        torch.from_numpy(most),
        torch.from_numpy(known),
        np.any(cramped, axis=1),
        np.any(turned, axis=1),
        strict=True,
    ):
        if is_cramped and grows:
            arena.relayout(torch.maximum(arena.length + arena.slack(arena.length), least))
        elif is_cramped:
            arena.extend(own)
        elif is_turned:
            arena.relayout(arena.allocated)
