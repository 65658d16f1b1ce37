"""Policies that look at the content: slabs whose heads are cut back at fixed positions.

vLLM cuts prompts into chunks by its load. So entries are given up where a position says, and not where a chunk ends:
before each token whose number is a multiple of a period. Between two cuts a head grows by one entry a token. How many
entries there are follows from positions alone, as in `layout`; which tokens they are follows from the tokens before.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field, fields, replace

import torch
from kvpolicy_kernels.append import append
from kvpolicy_kernels.attention import ragged_attention
from kvpolicy_kernels.compact import compact_in_place
from kvpolicy_kernels.segments import Chunk, Segments
from torch import Tensor

from kvpolicy import EvictionPolicy, LayerActivations
from kvpolicy_vllm.attend import BlockAttention, arena_of
from kvpolicy_vllm.layout import BlockLayout
from kvpolicy_vllm.observation import CutHeads, Observation, vectors
from kvpolicy_vllm.recorded import RecordedWork
from kvpolicy_vllm.steps import LayerStep


@dataclass(frozen=True, slots=True, eq=False)
class CutLayout(BlockLayout):
    """A slab. `slots` are the most entries of each KV head; a cut leaves `period` fewer. They lie in their order.

    observation: what the policy asks of queries, if it does
    """

    period: int
    observation: Observation | None

    @classmethod
    def every(cls, period: int, layout: BlockLayout, observation: Observation | None = None) -> CutLayout:
        known = {one.name: getattr(layout, one.name) for one in fields(BlockLayout)}
        return cls(**known, period=period, observation=observation)

    def slot(self, positions: Tensor) -> Tensor:
        begins = positions // self.period * self.period
        return torch.minimum(begins, self.slots[:, None] - self.period) + positions - begins

    def lengths(self, counts: Tensor) -> Tensor:
        return torch.where(counts > 0, self.slot((counts - 1).clamp(min=0)) + 1, 0)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class CutAttention(BlockAttention):
    """A cut waits for nothing: which heads it concerns, and how many entries stay, follows from the token's number.

    policy:  of `serving.CONTENT_POLICIES`;  layer: among the budgeted ones
    sizes:   `slots` of the heads, from the fewest on, on the host
    heads:   these heads, int64 [H];  by_size: the layout with the heads in this order
    at:      int64 [2], of the cut that is at work: the request's block, and its tokens
    recorded: cuts, of other layers too
    """

    layout: CutLayout
    on_host: CutLayout = field(init=False)
    policy: EvictionPolicy
    layer: int
    recorded: RecordedWork = field(default_factory=RecordedWork)
    sizes: list[int] = field(init=False)
    heads: Tensor = field(init=False)
    by_size: CutLayout = field(init=False)
    at: Tensor = field(init=False)

    def __post_init__(self) -> None:
        BlockAttention.__post_init__(self)
        sizes, order = self.on_host.slots.sort(stable=True)
        heads = order.to(self.layout.slots.device)
        by_size = replace(self.layout, slots=self.layout.slots[heads], offsets=self.layout.offsets[heads])
        at = torch.zeros(2, dtype=torch.int64, device=heads.device)
        known = {"sizes": sizes.tolist(), "heads": heads, "by_size": by_size, "at": at}
        for name, value in known.items():
            object.__setattr__(self, name, value)

    def decode(self, query: Tensor, key: Tensor, value: Tensor, cache: Tensor, step: LayerStep) -> Tensor:
        if step.queries is not None:
            append([vectors(cache)], step.queries, [query])
        return BlockAttention.decode(self, query, key, value, cache, step)

    def chunk(
        self, query: Tensor, key: Tensor, value: Tensor, cache: Tensor, blocks: Tensor, num_before: int
    ) -> Tensor:
        """From cut to cut: a piece attends to what is kept and to itself, and is written."""
        layout, period, end = self.layout, self.layout.period, num_before + len(query)
        keys, values = arena_of(cache)
        starts = blocks[0].long() * layout.rows + layout.offsets
        positions = torch.arange(num_before, end, device=query.device)
        counts = layout.slot(positions)  # entries before each token
        cuts = range((num_before // period + 1) * period, end, period)
        begins = [num_before, *(at for at in cuts if self._num_cut(at))]
        out = torch.empty_like(query)
        for begin, stop in zip(begins, [*begins[1:], end], strict=True):
            self.cut(cache, blocks, begin)
            span = slice(begin - num_before, stop - num_before)
            q, k, v = (x[span].transpose(0, 1)[None] for x in (query, key, value))
            segments = Segments(keys, values, starts, counts[:, begin - num_before].contiguous())
            attended = ragged_attention(q, segments, Chunk(k, v), scale=self.scale, softcap=self.softcap)
            out[span] = attended[0].transpose(0, 1)
            rows = starts[:, None] + counts[:, span]
            keys[rows], values[rows] = k[0], v[0]
            if layout.observation is not None:
                layout.observation.write_queries(query[span], cache, blocks[0].long(), begin)
        return out

    def _num_cut(self, count: int) -> int:
        """How many heads a cut before token `count` concerns, those with the fewest entries; 0 between two cuts."""
        period = self.layout.period
        return 0 if count % period else bisect_left(self.sizes, count + period)

    def cut(self, cache: Tensor, blocks: Tensor, count: int) -> None:
        """Before the token behind `count` ones of a request; most often there is nothing to do."""
        num_heads = self._num_cut(count)
        if num_heads == 0:
            return
        self.at.fill_(count)
        self.at[:1] = blocks[:1]
        longest = min(self.sizes[num_heads - 1], count)
        key = self.layer, num_heads, longest, cache.data_ptr()
        self.recorded.do(key, lambda: self._cut(cache, num_heads, longest), cache.device)

    def _cut(self, cache: Tensor, num_heads: int, longest: int) -> None:
        """Of the request `at`: those heads with the fewest entries. longest: the most entries of one."""
        layout, heads, (block, count) = self.by_size, self.heads[:num_heads], self.at.unbind()
        slots, most = layout.slots[:num_heads], self.sizes[num_heads - 1]
        lengths = slots.minimum(count)
        keys, values = arena_of(cache)
        segments = Segments(keys, values, block * layout.rows + layout.offsets[:num_heads], lengths)
        request = CutHeads(cache, block, heads, segments, count, torch.arange(longest, device=cache.device))
        activations = self._activations(request)
        kept = slots - layout.period
        columns = self._columns(activations, lengths, lengths - kept, most - layout.period)
        compact_in_place([keys, values], segments.starts, columns, kept)
        if layout.observation is not None:
            layout.observation.write_positions(activations.positions[0], request, columns, kept)

    def _activations(self, request: CutHeads) -> LayerActivations:
        """What the policy is shown."""
        segments, observation = request.segments, self.layout.observation
        if observation is None:
            rows = segments.starts[:, None] + torch.minimum(request.index, request.ends - 1)
            # a row's number stands for its position: such policies only compare positions
            positions = torch.where(request.index < request.ends, request.index, -1)
            return LayerActivations(self.layer, keys=segments.keys[rows][None], positions=positions[None])
        mass = observation.mass(request, self.scale, self.softcap)
        return LayerActivations(
            self.layer,
            positions=observation.positions(request, self.layout.period)[None],
            window_attention=mass.masked_fill(request.index >= request.ends, 0.0),
        )

    def _columns(self, activations: LayerActivations, lengths: Tensor, surplus: Tensor, most: int) -> Tensor:
        """The entries that stay, in their order: int64 [K, most]; what is behind a head's last one means nothing.

        lengths, surplus: int64 [K], entries of each head, and how many of them go, at most a period
        """
        scores, device = self.policy.score_prompt(activations)[0], lengths.device
        index = torch.arange(scores.shape[1], device=device)
        stays = (index < self.layout.num_sink_tokens) | (index >= lengths[:, None] - self.policy.recent_window)
        # of equal scores, such as those of two neighbours that are pooled, the older entry goes
        worst = scores.masked_fill(stays, float("inf")).sort(dim=-1, stable=True).indices[:, : self.layout.period]
        rank = index[: worst.shape[1]]
        gone = torch.where(rank < surplus[:, None], worst, scores.shape[1] + rank).sort(-1).values
        # in front of the entry that becomes number j lie those that go of which at most j that stay are in front
        place = index[:most].expand(len(lengths), -1).contiguous()
        return place + torch.searchsorted(gone - rank, place, right=True)
