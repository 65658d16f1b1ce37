"""Keys and values in one arena per layer, a segment per (sequence, KV head), each with a capacity of its own.

This store holds window-rule caches: the sink tokens, then a ring of the most recent ones. Token t lies in slot t
while it fits, afterwards in slot `sinks + (t - sinks) % (capacity - sinks)`, so that an append overwrites the oldest
entry. Attention does not depend on the order of the slots.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvpolicy.errors import BudgetError
from kvpolicy.spec import ModelSpec


class RaggedStore:
    """A cache for decoding loops.

    capacities: int `[L, H]`, entries each KV head may keep, equal for all sequences, each above num_sink_tokens
    Raises `BudgetError` for capacities that do not fit.
    """

    def __init__(
        self,
        spec: ModelSpec,
        capacities: Tensor,
        *,
        num_sink_tokens: int = 4,
        batch_size: int = 1,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if tuple(capacities.shape) != spec.table_shape or int(capacities.min()) <= num_sink_tokens:
            raise BudgetError(
                f"capacities must be (layers, KV heads) = {spec.table_shape} and above {num_sink_tokens} sink tokens, "
                f"got {tuple(capacities.shape)} from {int(capacities.min())}"
            )
        self.spec, self.num_sink_tokens, self.batch_size = spec, num_sink_tokens, batch_size
        self.capacities = capacities.to("cpu", torch.int64)
        rows = self.capacities.sum(1).tolist()
        shape = spec.attention
        # one arena a layer: [batch, sum of capacities, dim]; KV head h owns the columns from starts[layer][h]
        self.keys = [torch.zeros(batch_size, n, shape.key_dim, device=device, dtype=dtype) for n in rows]
        self.values = [torch.zeros(batch_size, n, shape.value_dim, device=device, dtype=dtype) for n in rows]
        self.starts = F.pad(self.capacities.cumsum(1), (1, 0))
        self.seen = [0] * spec.num_budgeted_layers

    @property
    def lengths(self) -> Tensor:
        """int64 `[L, H]`, entries each KV head holds now."""
        return torch.minimum(self.capacities, torch.tensor(self.seen)[:, None])

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor held, tables included."""
        tensors = [*self.keys, *self.values, self.capacities, self.starts]
        return sum(tensor.nbytes for tensor in tensors)

    def prefill(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
        """Attends densely over a prompt and keeps each KV head's part of it.

        query: [B, num_q_heads, n, D];  key, value: [B, H, n, D], keys after RoPE. Returns [B, num_q_heads, n, Dv].
        The layer must be empty.
        """
        if self.seen[layer]:
            raise BudgetError(f"layer {layer} already holds tokens; prefill takes the first prompt only")
        self.fill(layer, key, value)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)

    def fill(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Keeps each KV head's part of a prompt without attending. key, value: [B, H, n, D]."""
        length = key.shape[2]
        for head in range(self.spec.num_kv_heads):
            tokens = self._kept_tokens(length, int(self.capacities[layer, head]))
            slots = self._slots(layer, head, tokens).to(key.device)
            tokens = tokens.to(key.device)
            self.keys[layer][:, slots] = key[:, head, tokens].to(self.keys[layer].dtype)
            self.values[layer][:, slots] = value[:, head, tokens].to(self.values[layer].dtype)
        self.seen[layer] = length

    def decode(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
        """Writes one token into its slot of every KV head, then attends over what each head holds.

        query: [B, num_q_heads, 1, D];  key, value: [B, H, 1, D]. Returns [B, num_q_heads, 1, Dv].
        """
        token = torch.tensor([self.seen[layer]])
        self.seen[layer] += 1
        group = self.spec.group_size
        outputs = []
        for head, length in enumerate(self.lengths[layer].tolist()):
            slot = self._slots(layer, head, token).to(key.device)
            self.keys[layer][:, slot] = key[:, head]
            self.values[layer][:, slot] = value[:, head]
            segment = slice(int(self.starts[layer, head]), int(self.starts[layer, head]) + length)
            keys, values = self.keys[layer][:, None, segment], self.values[layer][:, None, segment]
            q = query[:, head * group : (head + 1) * group]
            keys, values = keys.expand(-1, group, -1, -1), values.expand(-1, group, -1, -1)
            outputs.append(F.scaled_dot_product_attention(q, keys, values, scale=scale))
        return torch.cat(outputs, 1)

    def _kept_tokens(self, length: int, capacity: int) -> Tensor:
        """Positions that a KV head keeps of the first `length` tokens: the sinks and the most recent."""
        if length <= capacity:
            return torch.arange(length)
        recent = capacity - self.num_sink_tokens
        return torch.cat([torch.arange(self.num_sink_tokens), torch.arange(length - recent, length)])

    def _slots(self, layer: int, head: int, tokens: Tensor) -> Tensor:
        """Columns of the layer's arena for tokens of one KV head."""
        capacity, sinks = int(self.capacities[layer, head]), self.num_sink_tokens
        ring = sinks + (tokens - sinks) % (capacity - sinks)
        return int(self.starts[layer, head]) + torch.where(tokens < capacity, tokens, ring)
