"""A step of single tokens: which rows it writes and reads, worked out for all layers at once.

Layers differ in their numbers alone, so that their heads are taken as the heads of one wide layer. Otherwise a step
would be some dozen small launches for each layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from kvpolicy_kernels.attention import WorkPlan, plan_work
from torch import Tensor

from kvpolicy_vllm.layout import BlockLayout
from kvpolicy_vllm.observation import Observation


@dataclass(frozen=True, slots=True, eq=False)
class LayerStep:
    """What one layer of H KV heads does with one token of each of B requests.

    rows:    int64 [B * H], where keys and values go
    lengths: int64 [B * H], the entries that are attended to
    starts:  int64 [B * H], where they begin in slabs;  blocks: int [B, P], those that they are in otherwise
    plan:    how the kernel shares the work; None on a CPU
    queries: int64 [B * num_q_heads], where queries go among the vectors of the blocks, if they are kept
    """

    rows: Tensor
    lengths: Tensor
    starts: Tensor | None
    blocks: Tensor
    plan: WorkPlan | None
    queries: Tensor | None


class LayerTables:
    """The layers of one rank.

    num_heads: the KV heads of all of them
    """

    def __init__(self, layouts: Sequence[BlockLayout], head_dim: int, observations: Sequence[Observation] = ()) -> None:
        """layouts: of one number of heads, sinks and tokens in a block, on one device; observations: theirs, if any"""
        first, self.num_layers, self.head_dim = layouts[0], len(layouts), head_dim
        tables = [layout.table for layout in layouts if layout.table is not None]
        self.wide = replace(
            first,
            slots=torch.cat([layout.slots for layout in layouts]),
            offsets=torch.cat([layout.offsets for layout in layouts]),
            table=torch.cat(tables, 1) if tables else None,
        )
        rows = torch.tensor([layout.rows for layout in layouts], device=first.slots.device)
        self.rows = rows.repeat_interleave(first.num_kv_heads)
        self.num_heads = len(self.rows)
        self.observations = list(observations)
        self.begins = torch.tensor([[one.rows, one.first] for one in observations], device=rows.device)

    def step(self, blocks: Tensor, counts: Tensor) -> list[LayerStep]:
        """For each layer. Waits for nothing.

        blocks: int [B, P or more], the blocks of each request; vLLM pads its tables
        counts: int [B], its tokens with this one; 0 for no request at all, whose row may hold anything
        """
        wide, num_blocks, counts = self.wide, self.wide.num_blocks, counts.long()
        used = torch.where(counts[:, None] > 0, blocks[:, :num_blocks], 0).long()  # vLLM gives block 0 to nobody
        slot = wide.slot((counts - 1).clamp(min=0)).t()
        rows = used.gather(1, slot // wide.slots) * self.rows + wide.offsets + slot % wide.slots
        lengths = self._by_layer(wide.lengths(counts).t())
        starts = self._by_layer(used * self.rows + wide.offsets) if num_blocks == 1 else None
        rows = self._by_layer(rows)
        plan = plan_work(lengths, head_dim=self.head_dim) if lengths.is_cuda else None
        queries = self._queries(used[:, 0], (counts - 1).clamp(min=0)) if self.observations else None
        return [
            LayerStep(
                rows[i],
                lengths[i],
                None if starts is None else starts[i],
                blocks[:, :num_blocks],
                None if plan is None else plan.layer(i),
                None if queries is None else queries[i],
            )
            for i in range(self.num_layers)
        ]

    def _queries(self, block: Tensor, tokens: Tensor) -> Tensor:
        """[L, B * num_q_heads]"""
        rows, first = self.begins.t()[:, :, None]
        return self.observations[0].vectors_of_queries(block * rows + first, tokens).flatten(1)

    def entries(self, counts: Tensor) -> int:
        """Entries that requests of so many tokens [B] hold, over all layers and heads of the rank."""
        return int(self.wide.lengths(counts.long()).sum())

    def _by_layer(self, table: Tensor) -> Tensor:
        """[B, L * H] to [L, B * H]."""
        return table.reshape(len(table), self.num_layers, -1).transpose(0, 1).flatten(1).contiguous()
