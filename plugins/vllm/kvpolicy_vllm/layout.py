"""Where the entries of one layer lie in vLLM's blocks, and which tokens they are.

A block holds `slots[h]` entries of each KV head h, head behind head, and stands for `tokens_per_block` tokens of a
request: a head's capacity after n tokens is `slots[h] * ceil(n / tokens_per_block)`. A slab is a block for all the
tokens that a request can have, so that the capacity is fixed. What is kept are the sink tokens and the most recent
ones, and an entry that was evicted never returns.

Everything follows from positions alone. A new block is filled first, and nothing is evicted meanwhile; then a token
takes the slot of the oldest entry that is no sink. So there is no state that a preempted request could lose, and that a
CUDA graph would have to carry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class BlockLayout:
    """The blocks of one layer, on one device.

    slots:            int64 [H], entries of each KV head in a block, each above `num_sink_tokens`
    offsets:          int64 [H], the row of a block at which each head begins
    rows:             rows of a block; heads of other ranks may have more than these
    tokens_per_block: tokens of a request that a block stands for
    num_sink_tokens:  first tokens, which stay
    num_blocks:       blocks of a request, at most
    table:            int32 [max_tokens, H], the slot of each token, where there are several blocks: going back from
        token to token would cost a decoding step more than reading it
    """

    slots: Tensor
    offsets: Tensor
    rows: int
    tokens_per_block: int
    num_sink_tokens: int
    num_blocks: int
    table: Tensor | None

    @classmethod
    def of(
        cls,
        slots: Sequence[int],
        tokens_per_block: int,
        num_sink_tokens: int,
        *,
        max_tokens: int,
        rows: int = 0,
        device: torch.device | str = "cpu",
    ) -> BlockLayout:
        """max_tokens: the most tokens of a request;  rows: at least so many rows in a block."""
        table = torch.tensor(list(slots), dtype=torch.int64)
        offsets, rows = table.cumsum(0) - table, max(int(table.sum()), rows)
        num_blocks = -(-max_tokens // tokens_per_block)
        layout = cls(table, offsets, rows, tokens_per_block, num_sink_tokens, num_blocks, None)
        found = layout._all_slots(max_tokens).to(device) if num_blocks > 1 else None
        return replace(layout, slots=table.to(device), offsets=offsets.to(device), table=found)

    @property
    def num_kv_heads(self) -> int:
        return self.slots.shape[0]

    def oldest(self, positions: Tensor) -> Tensor:
        """The oldest token besides the sinks that a query at each position [N] sees, int64 [H, N]."""
        block, inside = self._split(positions)
        slots, kept = self.slots[:, None], self.slots[:, None] - self.tokens_per_block
        behind = (inside + 1 - slots).clamp(min=0)
        return (self.num_sink_tokens - block * kept + behind).clamp(min=self.num_sink_tokens)

    def lengths(self, counts: Tensor) -> Tensor:
        """Entries of each head after so many tokens [N], int64 [H, N]."""
        block = (counts - 1).clamp(min=0) // self.tokens_per_block
        slots = self.slots[:, None]
        return block * slots + torch.minimum(counts - block * self.tokens_per_block, slots)

    def num_kept(self, begin: int, end: int, at: int) -> Tensor:
        """How many of the tokens from `begin` to before `end` a query at `at` sees, int64 [H]."""
        sinks = max(0, min(self.num_sink_tokens, end) - begin)
        oldest = self.oldest(torch.full((1,), at, device=self.slots.device))[:, 0]
        return (end - oldest.clamp(min=begin)).clamp(min=0) + sinks

    def slot(self, positions: Tensor) -> Tensor:
        """Which of a head's entries the token at each position [N] is or was, int64 [H, N].

        Entry j is the entry `j % slots[h]` of the request's block `j // slots[h]`.
        """
        if self.table is not None:
            return self.table[positions].t().long()
        return self._slot_in_ring(self.slots[:, None], positions)

    def rows_of(self, blocks: Tensor, heads: Tensor, positions: Tensor) -> Tensor:
        """The arena's rows of some heads' tokens, int64 [N].

        blocks: int [P], the blocks of one request;  heads, positions: int64 [N]
        """
        slots = self.slots[heads]
        slot = self._slot_in_ring(slots, positions) if self.table is None else self.table[positions, heads].long()
        return blocks.long()[slot // slots] * self.rows + self.offsets[heads] + slot % slots

    def _slot_in_ring(self, slots: Tensor, positions: Tensor) -> Tensor:
        """For slabs."""
        ring = slots - self.num_sink_tokens
        turned = self.num_sink_tokens + (positions - self.num_sink_tokens) % ring
        return torch.where(positions < slots, positions, turned)

    def _split(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return positions // self.tokens_per_block, positions % self.tokens_per_block

    def _all_slots(self, max_tokens: int) -> Tensor:
        """The table. A token that found no free place took another's, and that one a third's, blocks ago."""
        slots, position = self.slots[:, None], torch.arange(max_tokens).expand(self.num_kv_heads, -1)
        while True:
            block, inside = self._split(position)
            ring = (block + 1) * slots - self.num_sink_tokens
            turns = ((inside - slots) // ring + 1).clamp(min=0)
            if not bool(turns.any()):
                return (block * slots + inside).t().to(torch.int32).contiguous()
            position = position - turns * ring
