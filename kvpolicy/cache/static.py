"""A store at fixed addresses, for decoding in a CUDA graph.

One arena holds the entries of all layers. Capacities, starts and lengths are data on the device, so that a graph
captured once serves every prompt that fits. Each segment is a ring in the order in which its entries will be evicted
(`eviction_order`), so a decoding step is three launches a layer: write the entry, attend, merge.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from kvpolicy_kernels.append import append_next
from kvpolicy_kernels.attention import WorkPlan, decode_attention, plan_work
from kvpolicy_kernels.compact import compact
from kvpolicy_kernels.segments import Segments
from torch import Tensor

from kvpolicy.cache.arena import each_entry, on_device
from kvpolicy.cache.eviction_order import eviction_order
from kvpolicy.cache.layer import StoreLayer
from kvpolicy.cache.schedule import UNLIMITED
from kvpolicy.cache.scoring import Scoring, scores_stay
from kvpolicy.errors import BudgetError
from kvpolicy.model.spec import ModelSpec
from kvpolicy.plugins.roles import EvictionPolicy

if TYPE_CHECKING:
    from kvpolicy.cache.store import RaggedStore

PLAN_INTERVAL = 64
"""Decoded tokens after which the work is planned again while segments still grow."""


def check_static(policy: EvictionPolicy) -> None:
    """Raises `BudgetError` for a policy that a static store cannot serve.

    That is one that rescores while it decodes, and one whose context is held whole until it has been repeated.
    """
    if not scores_stay(policy):
        raise BudgetError(
            f"{type(policy).__name__} changes its scores at every decoded token, which a static store cannot: leave "
            "static out, or take a policy that scores the prompt alone"
        )
    if "repeat_attention" in policy.requires:
        raise BudgetError(
            f"{type(policy).__name__} requires repeat_attention: its context is held whole until the model has "
            "repeated it, and a static store takes each layer's part right after the prompt: leave static out, or "
            "take a policy that requires no repetition"
        )


class StaticStore:
    """Keys and values of every budgeted layer in one arena, a segment per (sequence, KV head).

    spec: the model's layers and heads
    rows: entries of all segments together
    num_heads:  KV heads held here
    num_pinned: first entries of a segment, which are never evicted
    device, dtype: of keys and values

    keys [R, D];  values [R, Dv];  positions int32 [R]
    starts, lengths, capacities, cursors: int64 [L, S]; starts in rows of the arena
    segments: of each layer, as the ops take them
    position: int32 [S], of the token decoded last
    due:      layer whose token comes next, counted on the host; None before a prompt, and where an `append` broke off
    decoded:  tokens since the prompt, counted on the host
    """

    def __init__(
        self,
        spec: ModelSpec,
        rows: int,
        *,
        batch_size: int,
        num_heads: int,
        num_pinned: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        shape, count = spec.attention, batch_size * num_heads
        self.spec, self.batch_size, self.num_heads, self.num_pinned = spec, batch_size, num_heads, num_pinned
        self.keys = torch.empty(rows, shape.key_dim, dtype=dtype, device=device)
        self.values = torch.empty(rows, shape.value_dim, dtype=dtype, device=device)
        self.positions = torch.empty(rows, dtype=torch.int32, device=device)
        tables = torch.zeros(4, spec.num_budgeted_layers, count, dtype=torch.int64, device=device)
        self.starts, self.lengths, self.capacities, self.cursors = tables
        self.segments = [
            Segments(self.keys, self.values, starts, lengths)
            for starts, lengths in zip(self.starts, self.lengths, strict=True)
        ]
        self.position = torch.zeros(count, dtype=torch.int32, device=device)
        self.plan = self._make_plan()
        self.clear()

    @classmethod
    def beside(
        cls, store: RaggedStore, context_length: int, *, device: str | torch.device, dtype: torch.dtype
    ) -> StaticStore:
        """An empty static store for all that `store` keeps of prompts of up to `context_length` tokens.

        Raises `BudgetError` for a policy that rescores while it decodes or has the context repeated.
        """
        check_static(store.policy)
        return cls(
            store.spec,
            store.batch_size * _rows(store, context_length),
            batch_size=store.batch_size,
            num_heads=store.num_heads,
            num_pinned=store.protection.num_pinned,
            device=torch.device(device),
            dtype=dtype,
        )

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        tables = [self.starts, self.lengths, self.capacities, self.cursors, self.position]
        plan = [self.plan.units, self.plan.quantum, self.plan.programs, self.plan.pieces]
        return [self.keys, self.values, self.positions, *tables, *plan]

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor held."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def seen(self) -> Tensor:
        """int64 [B], tokens of each sequence so far, padding excluded."""
        return self.position.view(self.batch_size, self.num_heads)[:, 0].long() + 1

    def clear(self) -> None:
        """Forgets everything; addresses stay."""
        for table in (self.starts, self.lengths, self.capacities, self.cursors):
            table.zero_()
        self.position.fill_(-1)
        self.used = 0  # rows that were given to segments
        self.growth = 0  # tokens until no segment grows any more
        self.due: int | None = None
        self.decoded = 0
        self._taken = 0  # layers whose prompt has come
        self._room: int | None = None  # tokens that can be decoded, where everything is kept
        self._most = 0  # entries that a segment is allowed then

    def rehearse(self) -> None:
        """Makes room for one token a segment, so that a step can be run, and captured, before any prompt has come."""
        self.clear()
        self.capacities.fill_(1)
        self.starts.copy_(torch.arange(self.starts.shape[1], device=self.starts.device).clamp(max=len(self.keys) - 1))
        self.replan()
        self.due = 0

    def take(self, layer: int, entries: StoreLayer, most: int) -> None:
        """Moves a layer's entries here after its prompt, each segment in the order in which they will be evicted.

        most: entries that a segment is allowed at most, where its capacity has no limit

        Raises `BudgetError` where the layer does not fit, and for protected spans that go beyond the prompt.
        """
        arena, capacity = entries.arena, entries.capacity.clamp(max=most)
        if entries.protection.end > int(entries.seen.min()):
            raise BudgetError(
                f"protected spans end at token {entries.protection.end}, the shortest prompt has "
                f"{int(entries.seen.min())}: a static store takes spans inside the prompt alone"
            )
        if bool((arena.length > capacity).any()):
            raise BudgetError(f"a prompt of {int(entries.seen.max())} tokens was given a static store for {most}")
        if self.used + int(capacity.sum()) > len(self.keys):
            raise BudgetError(
                f"layer {layer} needs {int(capacity.sum())} rows, the static store has {len(self.keys) - self.used} "
                f"of {len(self.keys)} left: its budget differs from the one it was made for"
            )
        start = self.used + capacity.cumsum(0) - capacity
        seen = on_device(entries.seen.repeat_interleave(self.num_heads)[:, None], arena.device)
        segment, offset = each_entry(arena.length, arena.device)
        into, first, length, allowed = on_device(
            torch.stack([start, arena.start, arena.length, capacity]), arena.device
        )
        rows = into[segment] + offset
        if (scores := arena.padded_scores()) is not None:  # without scores, entries lie in the order of their age
            order = eviction_order(scores, arena.padded_positions(), seen, allowed - length, entries.protection)
            offset = order[segment, offset]
        source = first[segment] + offset
        for out, column in zip(
            (self.keys, self.values, self.positions), (arena.keys, arena.values, arena.positions), strict=True
        ):
            compact(out, rows, column, source)
        for table, values in ((self.starts, into), (self.lengths, length), (self.capacities, allowed)):
            table[layer].copy_(values)
        self.used += int(capacity.sum())
        self.growth = max(self.growth, int((capacity - arena.length).max()))
        self.position.copy_(seen[:, 0] - 1)
        if bool((entries.capacity >= UNLIMITED).any()):
            self._room, self._most = most - int(entries.seen.max()), most
        self._taken += 1
        if self._taken == len(self.starts):
            self.due = 0

    def fill(self, store: RaggedStore, context_length: int) -> None:
        """Forgets what is here and takes over the prompts of `store`, which is of no use afterwards.

        Raises `BudgetError` as `take` does, and for a layer whose prompt has not come.
        """
        layers = [layer for layer in store.layers if layer is not None]
        if len(layers) < len(store.layers):
            raise BudgetError(f"layer {store.layers.index(None)} is empty: its prompt comes first")
        self.clear()
        for index, layer in enumerate(layers):
            self.take(index, layer, context_length)
            layer.arena.release()
        self.replan()

    def decode(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None = None,
        sink_logits: Tensor | None = None,
    ) -> Tensor:
        """`append`, and `attend`: one token of one layer, arguments as in `RaggedStore.decode`. Nothing but the device
        changes, so that a CUDA graph can hold it.
        """
        shape = self.spec.attention
        self.append(layer, key, value)
        return self.attend(layer, query, Scoring(shape.scale if scale is None else scale, shape.softcap, sink_logits))

    def replan(self) -> None:
        """Shares the work of a step again among the device's programs, after lengths have changed."""
        fresh = self._make_plan()
        for name in ("units", "quantum", "programs", "pieces"):
            getattr(self.plan, name).copy_(getattr(fresh, name))

    def count(self) -> None:
        """Counts a token on the host. `append` does it, and whoever replays a graph, which runs no `append`.

        Raises `BudgetError` where everything is kept and no room is left.
        """
        if self._room is not None and self.decoded >= self._room:
            raise BudgetError(
                f"everything is kept (retention 1), and there is room for {self._most} tokens: make the cache with a "
                "larger context_length"
            )
        self.decoded += 1

    def append(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Writes one token into every segment; over the entry that leaves next where it is full.

        key, value: [B, H, 1, dim]

        The first layer counts the token. Raises `BudgetError`, before anything is changed, for a layer out of turn (a
        step that broke off leaves a token in some layers only), for other shapes, and as `count` does.
        """
        self._check(layer, key, value)
        if layer == 0:
            self.count()
        self.due = None  # until the token has been written
        if layer == 0:
            self.position.add_(1)
        append_next(
            (self.keys, self.values, self.positions),
            (key, value, self.position),
            self.segments[layer].starts,
            self.segments[layer].lengths,
            self.capacities[layer],
            self.cursors[layer],
            self.num_pinned,
        )
        self.due = (layer + 1) % len(self.starts)

    def _check(self, layer: int, key: Tensor, value: Tensor) -> None:
        if layer != self.due:
            due = "no layer's" if self.due is None else f"layer {self.due}'s"
            raise BudgetError(
                f"a token of layer {layer} came where {due} was due: a prompt comes first, then the layers of each "
                "step in order, and behind a step that broke off a prompt again"
            )
        rows = (self.batch_size, self.num_heads, 1)
        if (key.shape[:3], value.shape[:3]) != (rows, rows):
            raise BudgetError(
                f"this static store holds {self.batch_size} sequences of {self.num_heads} KV heads and takes one token "
                f"of each, got keys and values of shape {tuple(key.shape)} and {tuple(value.shape)}"
            )

    def attend(self, layer: int, query: Tensor, scoring: Scoring) -> Tensor:
        """query: [B, num_q_heads, n, D], which see every entry held. Returns [B, num_q_heads, n, Dv]."""
        return decode_attention(query, self.segments[layer], plan=self.plan.layer(layer), **scoring.options()).out

    def _make_plan(self) -> WorkPlan:
        return plan_work(self.lengths, head_dim=max(self.keys.shape[1], self.values.shape[1]))


def _rows(store: RaggedStore, context_length: int) -> int:
    """Entries of one sequence at its capacities, protected spans included."""
    table = store.schedule.at(context_length, None)[:, store.first_head : store.first_head + store.num_heads]
    spanned = store.protection.num_spanned(store.protection.end) * table.numel()
    if store.split is not None and store.schedule.evicts:
        return max(store.schedule.total(context_length), store.split.floor * table.numel()) + spanned
    limited = table if int(table.max()) < UNLIMITED else table.clamp(max=context_length)
    return int(limited.sum()) + spanned
