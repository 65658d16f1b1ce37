"""Policies that look at the content: slabs whose heads are cut back at fixed positions.

vLLM cuts prompts into chunks by its load. So entries are given up where a position says, and not where a chunk ends:
before each token whose number is a multiple of a period. Between two cuts a head grows by one entry a token. How many
entries there are follows from positions alone, as in `layout`; which tokens they are follows from the tokens before.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch
from kvpolicy_kernels.attention import ragged_attention
from kvpolicy_kernels.segments import Chunk, Segments
from torch import Tensor

from kvpolicy import EvictionPolicy, LayerActivations
from kvpolicy_vllm.attend import BlockAttention, arena_of
from kvpolicy_vllm.layout import BlockLayout


@dataclass(frozen=True, slots=True, eq=False)
class CutLayout(BlockLayout):
    """A slab. `slots` are the most entries of each KV head; a cut leaves `period` fewer. They lie in their order."""

    period: int

    @classmethod
    def every(cls, period: int, layout: BlockLayout) -> CutLayout:
        return cls(**{one.name: getattr(layout, one.name) for one in fields(BlockLayout)}, period=period)

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
        starts = (blocks[0].long() * layout.rows + layout.offsets)[:, None]
        index = torch.arange(int(lengths.max()), device=cache.device)
        ends = lengths.to(cache.device)[:, None]
        rows = starts + torch.minimum(index, ends - 1)
        k, v = keys[rows], values[rows]
        # a row's number stands for its position: the policies here only compare positions
        activations = LayerActivations(
            self.layer, keys=k[None], values=v[None], positions=torch.where(index < ends, index, -1)[None]
        )
        scores = self.policy.score_prompt(activations)[0]
        pinned = (index < layout.num_sink_tokens) | (index >= ends - self.policy.recent_window)
        scores = scores.masked_fill(pinned, float("inf")).masked_fill(index >= ends, float("-inf"))
        order = scores.sort(dim=-1, descending=True, stable=True).indices
        most = int(kept.max())
        behind = torch.arange(most, device=cache.device) >= kept.to(cache.device)[:, None]
        chosen = order[:, :most].masked_fill(behind, len(index)).sort(-1).values.flatten()
        places = [torch.arange(n) + head * most for head, n in enumerate(kept.tolist())]
        place = torch.cat(places).to(cache.device)
        head = place // most
        rows = starts[head, 0] + place % most
        keys[rows], values[rows] = k[head, chosen[place]], v[head, chosen[place]]
