"""Attention of one layer over its blocks: torch and the kernels of kvpolicy, nothing of vLLM."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from kvpolicy_kernels.append import append
from kvpolicy_kernels.attention import decode_attention, ragged_attention
from kvpolicy_kernels.compact import compact
from kvpolicy_kernels.segments import BlockSegments, Segments
from kvpolicy_kernels.window_attention import window_attention
from torch import Tensor

from kvpolicy_vllm.layout import BlockLayout
from kvpolicy_vllm.steps import LayerStep


@dataclass(frozen=True, slots=True, eq=False)
class BlockAttention:
    """One layer of one rank. Query heads of a group follow each other.

    scale: of the scores;  softcap: scores become `softcap * tanh(score / softcap)`
    on_host: the layout where its numbers can be read
    """

    layout: BlockLayout
    scale: float
    softcap: float | None = None
    on_host: BlockLayout = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "on_host", replace(self.layout, slots=self.layout.slots.cpu()))

    def decode(self, query: Tensor, key: Tensor, value: Tensor, cache: Tensor, step: LayerStep) -> Tensor:
        """Writes one token of each request, then attends to what it sees. Waits for nothing, so that graphs hold it.

        query: [B, num_q_heads, D];  key, value: [B, num_kv_heads, D]
        cache: [num_blocks, rows, 2, D], written in place

        Returns [B, num_q_heads, D]; zeros for no request at all.
        """
        keys, values = arena_of(cache)
        append([keys, values], step.rows, [key, value])
        layout, query = self.layout, query[:, :, None]
        segments: Segments | BlockSegments
        if step.starts is None:
            segments = BlockSegments(keys, values, step.blocks, layout.rows, layout.offsets, layout.slots, step.lengths)
        else:
            segments = Segments(keys, values, step.starts, step.lengths)
            if step.plan is None:  # on a CPU this is the faster of the two
                return ragged_attention(query, segments, scale=self.scale, softcap=self.softcap)[:, :, 0]
        return decode_attention(query, segments, scale=self.scale, softcap=self.softcap, plan=step.plan).out[:, :, 0]

    def chunk(
        self, query: Tensor, key: Tensor, value: Tensor, cache: Tensor, blocks: Tensor, num_before: int
    ) -> Tensor:
        """Attends to what each of a request's next tokens would see token by token, then writes those that are left.

        query: [m, num_q_heads, D];  key, value: [m, num_kv_heads, D]
        cache: [num_blocks, rows, 2, D], written in place;  blocks: int [P], the request's
        num_before: tokens of the request before these

        Returns [m, num_q_heads, D].
        """
        layout, count = self.layout, len(query)
        keys, values = arena_of(cache)
        k, v, skipped = self._seen(key, value, cache, blocks, num_before)
        out = window_attention(
            query.transpose(0, 1)[None],
            k,
            v,
            layout.slots,
            layout.num_sink_tokens,
            scale=self.scale,
            softcap=self.softcap,
            tokens_per_block=layout.tokens_per_block if layout.num_blocks > 1 else None,
            skipped=skipped,
        )
        head, token = self._kept(num_before, num_before + count, num_before + count - 1)
        rows = layout.rows_of(blocks, head, token)
        for arena, new in ((keys, key), (values, value)):
            compact(arena, rows, new.transpose(0, 1)[None], head * count + token - num_before)
        return out[0].transpose(0, 1)

    def _seen(
        self, key: Tensor, value: Tensor, cache: Tensor, blocks: Tensor, num_before: int
    ) -> tuple[Tensor, Tensor, int]:
        """Keys and values [1, num_kv_heads, T, D] of all that a chunk sees, and the tokens left out behind the sinks.

        What comes before the chunk is as long as the longest head's entries. A shorter head has zeros behind its sinks,
        which its window hides.
        """
        layout, (count, heads, dim) = self.layout, key.shape
        if num_before == 0:
            return key.transpose(0, 1)[None], value.transpose(0, 1)[None], 0
        longest = max(self._num_kept(0, num_before, num_before))
        skipped = num_before - longest
        head, token = self._kept(0, num_before, num_before)
        rows = layout.rows_of(blocks, head, token)
        column = torch.where(token < layout.num_sink_tokens, token, token - skipped)
        seen = []
        for arena, new in zip(arena_of(cache), (key, value), strict=True):
            joined = new.new_zeros(1, heads, longest + count, dim)
            compact(joined.view(-1, dim), head * (longest + count) + column, arena, rows)
            joined[0, :, longest:] = new.transpose(0, 1)
            seen.append(joined)
        return seen[0], seen[1], skipped

    def _num_kept(self, begin: int, end: int, at: int) -> list[int]:
        """How many tokens of each head `_kept` returns. Read on the host."""
        counts: list[int] = self.on_host.num_kept(begin, end, at).tolist()
        return counts

    def _kept(self, begin: int, end: int, at: int) -> tuple[Tensor, Tensor]:
        """The head and the number of each token from `begin` to before `end` that a query at `at` sees, int64 [K].

        Waits for nothing.
        """
        layout, total = self.layout, sum(self._num_kept(begin, end, at))
        counts = layout.num_kept(begin, end, at)
        head = torch.repeat_interleave(counts, output_size=total)
        place = torch.arange(total, device=head.device) - (counts.cumsum(0) - counts)[head]
        sinks = max(0, min(layout.num_sink_tokens, end) - begin)
        return head, torch.where(place < sinks, begin, end - counts[head]) + place


def arena_of(cache: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [R, D] of all blocks of a layer, as views."""
    rows = cache.flatten(0, 1)
    return rows[:, 0], rows[:, 1]
