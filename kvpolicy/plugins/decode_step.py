"""What the core hands to a policy after a decoded token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvpolicy.plugins.activations import ABSENT, Sources


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class DecodeStep(Sources):
    """The entries of one layer after one decoding step.

    Segment i belongs to sequence `i // num_kv_heads` and KV head `i % num_kv_heads` and spans
    `indptr[i]` to `indptr[i + 1]`.

    num_kv_heads: KV heads of the layer; under tensor parallelism those of this rank
    scores, positions: [num_entries];  indptr: [B * num_kv_heads + 1] int32
    keys:      [num_entries, key_dim]; raises `PluginError` unless "keys" is required
    attention: [num_entries] mass of this step summed over the query group; as keys, for "decode_attention"
    """

    layer: int
    num_kv_heads: int
    scores: Tensor
    positions: Tensor
    indptr: Tensor
    keys: Tensor = ABSENT
    attention: Tensor = ABSENT

    @property
    def segment(self) -> Tensor:
        """int64 [num_entries], the segment of each entry."""
        lengths = self.indptr.diff()
        segments = torch.arange(len(lengths), device=lengths.device)
        return segments.repeat_interleave(lengths, output_size=len(self.scores))
