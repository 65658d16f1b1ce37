"""An arena whose keys have lost the channels that matter least (ThinK).

Which channels a KV head keeps is chosen once, by the queries and the keys of its prompt, and holds for all entries from
then on; the sink tokens and the last tokens have an exact copy beside. Attention is given whole keys with zeros in
the channels that are gone, so that its scores are those of the channels that are left.

Source: ThinK, arXiv:2407.21018; SalesforceAIResearch/ThinK; NVIDIA/kvpress, kvpress/presses/think_press.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from kvpolicy_kernels.formats import EntryFormat
from kvpolicy_kernels.rebuild import rebuild
from kvpolicy_kernels.rebuild.op import Chosen
from torch import Tensor

from kvpolicy.cache.arena import LayerArena
from kvpolicy.cache.chunk import Chunk
from kvpolicy.cache.copies import copy_with
from kvpolicy.cache.device_tables import each_entry, on_device, owners_of
from kvpolicy.cache.exact_block import ExactBlock
from kvpolicy.errors import KVPolicyError
from kvpolicy.model.layer_spec import LayerSpec

OBSERVED = 32
"""The last queries of a prompt, which choose."""
_PIECE = 4096  # keys that are squared at a time


class ThinArena(LayerArena):
    """A `LayerArena` of keys with fewer channels.

    keys:     [R, kept], where `kept` is `EntryFormat.key_dim`
    channels: uint8 [S, kept], ascending: which these are of each segment's keys
    exact:    the keys of the tokens that stay exact; their values are in the arena as they are
    """

    def __init__(
        self,
        segments: tuple[int, int],
        shape: LayerSpec,
        dtype: torch.dtype,
        device: torch.device,
        *,
        entry_format: EntryFormat,
        num_sinks: int,
        num_pinned: int,
        scored: bool,
    ) -> None:
        """segments: (B, H)"""
        count, kept = segments[0] * segments[1], entry_format.key_dim(shape.key_dim)
        super().__init__(count, kept, shape.value_dim, dtype, device, num_pinned=num_pinned, scored=scored)
        self.num_heads, self._like = segments[1], self.values.new_empty(0, shape.key_dim)
        self.channels = torch.arange(kept, dtype=torch.uint8, device=device).repeat(count, 1)
        key = self.values.new_empty(*segments, 0, shape.key_dim)
        self.exact = ExactBlock(key, key[..., :0], num_sinks, entry_format.exact_recent)
        self._squares: Tensor | None = None  # float32 [S, D], of the last queries, until channels have been chosen

    @property
    def tensors(self) -> dict[str, Tensor]:
        return super().tensors | self.beside

    @property
    def beside(self) -> dict[str, Tensor]:
        return self.exact.tokens | {"channels": self.channels}

    @property
    def like(self) -> Tensor:
        return self._like

    @property
    def vectors(self) -> tuple[Tensor, Tensor]:
        owners = self.owners()
        keys = self.keys.new_zeros(len(self.keys), self._like.shape[1])
        keys = keys.scatter_(1, self.channels[owners].long(), self.keys)
        return self.exact.over(keys, self.values[:, :0], self.positions, owners)[0], self.values

    def watch_queries(self, query: Tensor, chunk: Chunk) -> None:
        """Where there are no channels yet, the last of these queries choose them, once tokens of the chunk are kept.

        query: [B, num_q_heads, n, D] of the chunk's last n tokens
        """
        if bool((self.length == 0).any()) and query.shape[2]:
            last, batch = query[:, :, -OBSERVED:].detach().float(), len(query)
            valid = on_device(chunk.positions[:, -last.shape[2] :] >= 0, query.device)[:, None, None, :, None]
            squares = last.square().view(batch, self.num_heads, -1, *last.shape[2:]).mul(valid)
            count = valid.sum(3).clamp(min=1)
            self._squares = (squares.mean(2, keepdim=True).sum(3) / count).view(-1, last.shape[3])

    def replace(
        self,
        columns: Tensor,
        counts: Tensor,
        allocated: Tensor,
        positions: Tensor,
        scores: Tensor | None,
        chunk: Chunk | None = None,
    ) -> None:
        if chunk is not None and self._squares is not None:
            self._choose(columns, counts, chunk, self._squares)
            self._squares = None
        super().replace(columns, counts, allocated, positions, scores, chunk)
        if chunk is not None:
            self.exact.add(Chunk(chunk.key, chunk.value[..., :0], chunk.positions))

    def _choose(self, columns: Tensor, counts: Tensor, chunk: Chunk, squares: Tensor) -> None:
        """The channels of the segments that hold nothing yet. squares: of queries, float32 [S, D]; rest as `replace`"""
        segment, offset = each_entry(counts, self.device)
        token = columns[segment, offset] - self.width
        kept = squares.new_zeros(len(counts), len(chunk) + 1)  # the last column takes what is an entry already
        kept[segment, torch.where(token < 0, len(chunk), token)] = 1
        keys, weights = chunk.key.detach().flatten(0, 1), kept[:, None, :-1]
        total = torch.zeros_like(squares)
        for first in range(0, len(chunk), _PIECE):
            piece = slice(first, first + _PIECE)
            total += (weights[..., piece] @ keys[:, piece].float().square())[:, 0]
        score = squares * total / weights.sum(2).clamp(min=1)
        best = score.topk(self.channels.shape[1]).indices.sort().values.to(torch.uint8)
        is_new = on_device((self.length == 0)[:, None], self.device)
        self.channels = torch.where(is_new, best, self.channels)

    def fill(
        self, length: Tensor, allocated: Tensor, entries: Mapping[str, Tensor], beside: Mapping[str, Tensor]
    ) -> None:
        if int(beside["channels"].max()) >= self._like.shape[1]:
            raise KVPolicyError(
                f"'channels' holds {int(beside['channels'].max())}, keys have {self._like.shape[1]} of them"
            )
        super().fill(length, allocated, entries, beside)

    def fork(self) -> ThinArena:
        copy: ThinArena = super().fork()  # type: ignore[assignment]  # of its own class
        return copy_with(copy, exact=self.exact.fork(), channels=self.channels.clone())

    def take(self, segments: Tensor) -> None:
        super().take(segments)
        self.exact.take(segments[:: self.num_heads] // self.num_heads)
        channels = self.channels[on_device(segments, self.device)]
        if channels.shape == self.channels.shape:  # at its address, which a graph knows
            self.channels.copy_(channels)
        else:
            self.channels = channels

    def forget(self, settled: Tensor) -> None:
        self.exact.forget(settled)

    def _put(self, key: Tensor, value: Tensor, position: Tensor, rows: Tensor, score: float) -> None:
        thin = key.reshape(len(self.channels), -1).gather(1, self.channels.long())
        super()._put(thin, value, position, rows, score)
        self.exact.write(key, position)

    def _fill(
        self, new: dict[str, Tensor], chosen: Chosen, chunk: Chunk | None, numbers: Sequence[tuple[Tensor, Tensor]]
    ) -> None:
        if chunk is not None:
            keys = chunk.key.new_zeros(len(new["keys"]), chunk.key.shape[-1])
            rebuild([keys, new["values"]], chosen, None, (chunk.key.detach(), chunk.value.detach()))
            new["keys"] = keys.gather(1, self.channels[owners_of(chosen.starts, len(keys))].long())
        rebuild([new["keys"], new["values"]], chosen, self._columns() if chosen.width else None, None, numbers)
