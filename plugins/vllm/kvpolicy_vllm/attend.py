"""Attention of one layer over its blocks: torch and the kernels of kvpolicy, nothing of vLLM."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from kvpolicy_kernels.append import append
from kvpolicy_kernels.attention import decode_attention, ragged_attention
from kvpolicy_kernels.compact import compact
from kvpolicy_kernels.segments import Segments
from kvpolicy_kernels.window_attention import window_attention
from torch import Tensor

from kvpolicy_vllm.layout import BlockLayout

BLOCK = 256  # queries of a chunk that attend at once, so that no mask is [heads, chunk, chunk]


@dataclass(frozen=True, slots=True, eq=False)
class BlockAttention:
    """One layer of one rank. Query heads of a group follow each other.

    scale: of the scores;  softcap: scores become `softcap * tanh(score / softcap)`
    capacities: entries of each KV head in a block, on the host
    """

    layout: BlockLayout
    scale: float
    softcap: float | None = None
    capacities: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "capacities", tuple(self.layout.slots.tolist()))

    def decode(
        self, query: Tensor, key: Tensor, value: Tensor, cache: Tensor, blocks: Tensor, counts: Tensor
    ) -> Tensor:
        """Writes one token of each request, then attends to what it sees. Waits for nothing, so that graphs hold it.

        query: [B, num_q_heads, D];  key, value: [B, num_kv_heads, D]
        cache: [num_blocks, rows, 2, D], written in place;  blocks: int [B, P], the blocks of each request
        counts: int [B], its tokens with this one; 0 for no request at all, whose row may hold anything

        Returns [B, num_q_heads, D].
        """
        layout, counts = self.layout, counts.long()
        used = torch.where(counts[:, None] > 0, blocks, 0).long()  # vLLM gives block 0 to nobody
        slot = layout.slot((counts - 1).clamp(min=0))
        number, inside = slot // layout.slots[:, None], slot % layout.slots[:, None]
        rows = used.gather(1, number.t()) * layout.rows + layout.offsets + inside.t()
        keys, values = _arena(cache)
        append([keys, values], rows.flatten(), [key, value])
        if layout.num_blocks == 1:
            starts = used[:, :1] * layout.rows + layout.offsets
            segments = Segments(keys, values, starts.flatten(), layout.lengths(counts).t().flatten())
            out = ragged_attention(query[:, :, None], segments, scale=self.scale, softcap=self.softcap)
            return out[:, :, 0]
        return self._over_blocks(query, keys, values, used, counts)

    def _over_blocks(self, query: Tensor, keys: Tensor, values: Tensor, blocks: Tensor, counts: Tensor) -> Tensor:
        """Each block of a request attends as if it were a request, and their answers are merged."""
        layout, (num_requests, num_blocks) = self.layout, blocks.shape
        starts = blocks[:, :, None] * layout.rows + layout.offsets
        lengths = layout.block_lengths(counts, num_blocks)
        segments = Segments(keys, values, starts.flatten(), lengths.flatten())
        parts = query.repeat_interleave(num_blocks, 0)[:, :, None]
        out, lse, _ = decode_attention(parts, segments, scale=self.scale, softcap=self.softcap, with_lse=True)
        if lse is None:
            raise RuntimeError("decode_attention returned no log-sum-exp although it was asked for")
        out, lse = (x[:, :, 0].view(num_requests, num_blocks, *x.shape[1:2], *x.shape[3:]) for x in (out, lse))
        weights = torch.softmax(lse, 1).nan_to_num(0.0)  # nothing at all is seen in the rows of no request
        return torch.sum(out.float() * weights[..., None], 1).to(out.dtype)

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
        attend = self._in_one_window if layout.num_blocks == 1 else self._head_by_head
        out = attend(query, key, value, cache, blocks, num_before)
        positions = torch.arange(num_before, num_before + count, device=query.device)
        oldest = layout.oldest(positions[-1:])
        kept = (positions < layout.num_sink_tokens) | (positions >= oldest)  # [H, m]
        head, token = kept.nonzero().unbind(1)
        rows = layout.rows_of(blocks, layout.slot(positions))[head, token]
        keys, values = _arena(cache)
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
            before = [arena[rows].masked_fill(hidden[..., None], 0)[None] for arena in _arena(cache)]
            k, v = torch.cat([before[0], k], 2), torch.cat([before[1], v], 2)
        out = window_attention(
            q,
            k,
            v,
            self.capacities,
            layout.num_sink_tokens,
            scale=self.scale,
            softcap=self.softcap,
            backend="triton" if query.is_cuda else "auto",  # untried there, so that the check at start must pass
        )
        return out[0].transpose(0, 1)

    def _head_by_head(
        self, query: Tensor, key: Tensor, value: Tensor, cache: Tensor, blocks: Tensor, num_before: int
    ) -> Tensor:
        """For growing blocks: a head's entries, then the tokens of the chunk, under a mask by position."""
        layout, count, device = self.layout, len(query), query.device
        keys, values = _arena(cache)
        positions = torch.arange(num_before + count, device=device)
        oldest = layout.oldest(positions[num_before:])  # [H, m]
        before = positions[:num_before]
        kept = (before < layout.num_sink_tokens) | (before >= oldest[:, :1])
        rows = layout.rows_of(blocks, layout.slot(before))
        group = query.shape[1] // layout.num_kv_heads
        out = torch.empty_like(query)
        for head in range(layout.num_kv_heads):
            entries = rows[head, kept[head]]
            k, v = (torch.cat([arena[entries], new[:, head]]) for arena, new in ((keys, key), (values, value)))
            where = torch.cat([before[kept[head]], positions[num_before:]])
            heads = slice(head * group, (head + 1) * group)
            for begin in range(0, count, BLOCK):
                end = min(begin + BLOCK, count)
                seen = len(entries) + end
                at = positions[num_before + begin : num_before + end, None]
                near = (where[:seen] >= oldest[head, begin:end, None]) | (where[:seen] < layout.num_sink_tokens)
                mask = near & (where[:seen] <= at)
                out[begin:end, heads] = self._masked(query[begin:end, heads], k[:seen], v[:seen], mask)
        return out

    def _masked(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """query: [n, group, D]; key, value: [m, D]; mask: bool [n, m]. Returns [n, group, D]."""
        q = query.transpose(0, 1)
        if self.softcap is not None:
            scores = self.softcap * torch.tanh((q @ key.t()).float() * (self.scale / self.softcap))
            return (scores.masked_fill(~mask, float("-inf")).softmax(-1).to(value.dtype) @ value).transpose(0, 1)
        k, v = (x.expand(q.shape[0], -1, -1) for x in (key, value))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale).transpose(0, 1)


def _arena(cache: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [R, D] of all blocks of a layer, as views."""
    rows = cache.flatten(0, 1)
    return rows[:, 0], rows[:, 1]
