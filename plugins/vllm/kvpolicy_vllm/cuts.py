"""Policies that look at the content: slabs whose heads are cut back at fixed positions.

vLLM cuts prompts into chunks by its load. So entries are given up where a position says, and not where a chunk ends:
before each token whose number is a multiple of a period. Between two cuts a head grows by one entry a token. How many
entries there are follows from positions alone, as in `layout`; which tokens they are follows from the tokens before.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch
from kvpolicy_kernels.append import append
from kvpolicy_kernels.attention import ragged_attention
from kvpolicy_kernels.segments import Chunk, Segments
from torch import Tensor

from kvpolicy import EvictionPolicy, LayerActivations
from kvpolicy_vllm.attend import BlockAttention, arena_of
from kvpolicy_vllm.layout import BlockLayout
from kvpolicy_vllm.observation import Observation, vectors
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
    """policy: of `serving.CONTENT_POLICIES`;  layer: among the budgeted ones"""

    layout: CutLayout
    on_host: CutLayout = field(init=False)
    policy: EvictionPolicy
    layer: int

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
        begins = [num_before, *range((num_before // period + 1) * period, end, period)]
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

    def cut(self, cache: Tensor, blocks: Tensor, count: int) -> None:
        """Before the token behind `count` ones of a request; between two cuts there is nothing to do."""
        layout, host = self.layout, self.on_host
        if count == 0 or count % layout.period:
            return
        lengths = host.lengths(torch.tensor([count]))[:, 0]
        kept = torch.minimum(lengths, host.slots - layout.period)
        if torch.equal(lengths, kept):
            return
        keys, values = arena_of(cache)
        block = blocks[0].long()
        segments = Segments(keys, values, block * layout.rows + layout.offsets, lengths.to(cache.device))
        activations = self._activations(cache, block, segments, count, int(lengths.max()))
        chosen = self._chosen(activations, segments.lengths, kept)
        most = chosen.shape[1]
        place = torch.cat([torch.arange(n) + head * most for head, n in enumerate(kept.tolist())]).to(cache.device)
        head, entry = place // most, place % most
        rows, old = segments.starts[head] + entry, chosen[head, entry]
        keys[rows], values[rows] = activations.keys[0, head, old], activations.values[0, head, old]
        if layout.observation is not None:
            layout.observation.write_positions(activations.positions[0, head, old], cache, block, head, entry)

    def _activations(
        self, cache: Tensor, block: Tensor, segments: Segments, count: int, longest: int
    ) -> LayerActivations:
        """What the policy is shown of a request with `count` tokens, whose entries the segments are."""
        index, ends = torch.arange(longest, device=cache.device), segments.lengths[:, None]
        rows = segments.starts[:, None] + torch.minimum(index, ends - 1)
        keys, values = segments.keys[rows][None], segments.values[rows][None]
        observation = self.layout.observation
        if observation is None:
            # a row's number stands for its position: such policies only compare positions
            positions = torch.where(index < ends, index, -1)
            return LayerActivations(self.layer, keys=keys, values=values, positions=positions[None])
        positions = observation.positions(cache, block, segments.lengths, index, count, self.layout.period)
        mass = observation.mass(cache, block, segments, count, self.scale, self.softcap)
        return LayerActivations(
            self.layer,
            keys=keys,
            values=values,
            positions=positions[None],
            window_attention=mass.masked_fill(index >= ends, 0.0),
        )

    def _chosen(self, activations: LayerActivations, lengths: Tensor, kept: Tensor) -> Tensor:
        """The entries that stay, in their order: int64 [H, most], behind a head's last one a number of none.

        lengths: int64 [H];  kept: likewise, on the host
        """
        scores, device = self.policy.score_prompt(activations)[0], lengths.device
        index, ends = torch.arange(scores.shape[1], device=device), lengths[:, None]
        pinned = (index < self.layout.num_sink_tokens) | (index >= ends - self.policy.recent_window)
        scores = scores.masked_fill(pinned, float("inf")).masked_fill(index >= ends, float("-inf"))
        # of equal scores, such as those of two neighbours that are pooled, the more recent entry stays
        order = len(index) - 1 - scores.flip(-1).sort(dim=-1, descending=True, stable=True).indices
        most = int(kept.max())
        behind = torch.arange(most, device=device) >= kept.to(device)[:, None]
        return order[:, :most].masked_fill(behind, len(index)).sort(-1).values
