"""One token on top of every layer of a store.

Nothing of a layer's arena changes then, so its tables go to the device once, and a token is a column of the tails: the
same one in all layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from kvpolicy_kernels.attention import plan_work

from kvpolicy.cache.device_tables import on_device
from kvpolicy.cache.layer import StoreLayer
from kvpolicy.cache.step import PlannedStep, TailStep
from kvpolicy.cache.tail import Columns, Tail


def plan_on_top(layers: Sequence[StoreLayer | None], room: int) -> PlannedStep:
    """The step of each layer; none where the layers do not all stand alike, or where so many tokens are on top.

    room: most tokens on top
    """
    opened = [layer for layer in layers if layer is not None and not layer.is_unwritten]
    if len(opened) < len(layers):
        return PlannedStep()
    first = opened[0]
    seen, count = first.seen, _count(first)
    if count >= room or not all(_count(layer) == count and torch.equal(layer.seen, seen) for layer in opened):
        return PlannedStep()
    tails = _tails(opened)
    if len(tails) < len(opened) or tails[0].columns.room != room:
        _open(opened, room)
        tails = _tails(opened)
    tails[0].columns.add(count)
    positions = torch.cat([tails[0].positions, seen[:, None]], 1)
    return PlannedStep([TailStep(tail, seen + 1, positions) for tail in tails])


def _count(layer: StoreLayer) -> int:
    return 0 if layer.pending is None else len(layer.pending)


def _tails(layers: Sequence[StoreLayer]) -> list[Tail]:
    """Those of layers that stand as their first token on top has left them."""
    return [layer.pending for layer in layers if isinstance(layer.pending, Tail) and layer.arena.placed is not None]


def _open(layers: Sequence[StoreLayer], room: int) -> None:
    """Makes the tails, and brings the tables of the arenas to the device."""
    devices = {layer.arena.device for layer in layers}
    first = layers[0]
    pending = first.pending or first.arena.no_tokens(len(first.seen))
    columns = Columns(pending.positions, room, devices)
    seen = first.seen.repeat_interleave(first.num_heads)
    tables = torch.stack([torch.stack([layer.arena.start, layer.arena.length, seen]) for layer in layers], 1)
    for device in devices:
        placed = on_device(tables, device)
        work = None
        if device.type == "cuda":
            work = plan_work(placed[1], head_dim=first.arena.head_dim, num_programs=first.arena.num_programs)
        for index, layer in enumerate(layers):
            if layer.arena.device == device:
                start, length, seen = placed[:, index]
                layer.arena.place(start, length, seen, None if work is None else work.layer(index))
    for layer in layers:
        layer.open_tail(columns)
