"""Attention of one layer over its blocks: torch and the kernels of kvpolicy, nothing of vLLM."""

from __future__ import annotations

from collections.abc import Sequence
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
    on_host: the layout where its numbers can be read;  capacities: entries of each KV head in a block
    """

    layout: BlockLayout
    scale: float
    softcap: float | None = None
    on_host: BlockLayout = field(init=False)
    capacities: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "on_host", replace(self.layout, slots=self.layout.slots.cpu()))
        object.__setattr__(self, "capacities", tuple(self.on_host.slots.tolist()))

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
        attend = self._in_one_window if layout.num_blocks == 1 else self._block_by_block
        out = attend(query, key, value, cache, blocks, num_before)
        positions = torch.arange(num_before, num_before + count, device=query.device)
        oldest = layout.oldest(positions[-1:])
        kept = (positions < layout.num_sink_tokens) | (positions >= oldest)  # [H, m]
        head, token = kept.nonzero().unbind(1)
        rows = layout.rows_of(blocks, layout.slot(positions))[head, token]
        keys, values = arena_of(cache)
        for arena, new in ((keys, key), (values, value)):
            compact(arena, rows, new.transpose(0, 1)[None], head * count + token)
        return out

    def _in_one_window(
        self, query: Tensor, key: Tensor, value: Tensor, cache: Tensor, blocks: Tensor, num_before: int
    ) -> Tensor:
        """For a slab. Its windows do not grow, so what lies between sinks and windows is left out of the tokens.

        What remains before the chunk is as long as the longest head's entries; a shorter head's begin with zeros, which
        its window hides.
        """
        layout = self.layout
        q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
        if num_before > 0:
            sinks, longest = layout.num_sink_tokens, min(num_before, max(self.capacities))
            column = torch.arange(longest, device=query.device)
            position = torch.where(column < sinks, column, column + num_before - longest)
            oldest = layout.oldest(torch.tensor([num_before], device=query.device))
            hidden = (position >= sinks) & (position < oldest)  # [H, longest]
            rows = layout.rows_of(blocks, layout.slot(position))
            before = [arena[rows].masked_fill(hidden[..., None], 0)[None] for arena in arena_of(cache)]
            k, v = torch.cat([before[0], k], 2), torch.cat([before[1], v], 2)
        return self._windows(q, k, v, self.capacities)

    def _block_by_block(
        self, query: Tensor, key: Tensor, value: Tensor, cache: Tensor, blocks: Tensor, num_before: int
    ) -> Tensor:
        """For growing blocks, head by head.

        Within a block a head's window is fixed, once the tokens are left out that were evicted before the block began
        or the chunk did.
        """
        layout, sinks, end = self.layout, self.layout.num_sink_tokens, num_before + len(query)
        tokens = layout.tokens_per_block
        begins = [num_before, *range((num_before // tokens + 1) * tokens, end, tokens)]
        ends = [*begins[1:], end]
        oldest = self.on_host.oldest(torch.tensor(begins)).tolist()
        before = torch.arange(num_before, device=query.device)
        rows = layout.rows_of(blocks, layout.slot(before))
        group = query.shape[1] // layout.num_kv_heads
        out = torch.empty_like(query)
        for head, slots in enumerate(self.capacities):
            gap = oldest[head][0] - sinks  # tokens behind the sinks that are evicted already
            entries = torch.cat([rows[head, :sinks], rows[head, sinks + gap :]])
            k, v = (
                torch.cat([old[entries], new[:, head]]) for old, new in zip(arena_of(cache), (key, value), strict=True)
            )
            heads = slice(head * group, (head + 1) * group)
            for first, begin, stop in zip(oldest[head], begins, ends, strict=True):
                seen_k, seen_v = (torch.cat([x[:sinks], x[first - gap : stop - gap]])[None, None] for x in (k, v))
                span = slice(begin - num_before, stop - num_before)
                capacity = (begin // tokens + 1) * slots
                out[span, heads] = self._windows(query[span, heads].transpose(0, 1)[None], seen_k, seen_v, [capacity])
        return out

    def _windows(self, query: Tensor, key: Tensor, value: Tensor, capacities: Sequence[int]) -> Tensor:
        """As `window_attention` has it, for one request; returns [m, num_q_heads, D]."""
        out = window_attention(
            query,
            key,
            value,
            capacities,
            self.layout.num_sink_tokens,
            scale=self.scale,
            softcap=self.softcap,
        )
        return out[0].transpose(0, 1)


def arena_of(cache: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [R, D] of all blocks of a layer, as views."""
    rows = cache.flatten(0, 1)
    return rows[:, 0], rows[:, 1]
