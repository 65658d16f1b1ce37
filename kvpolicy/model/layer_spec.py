"""What the core knows of one layer of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LayerKind = Literal["full", "sliding", "chunked", "linear"]


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """Attention of one decoder layer.

    kind:        what the layer attends to; only "full" layers that own their KV get a budget
    num_q_heads, num_kv_heads: heads of queries; of keys and values
    key_dim, value_dim: elements of one key; of one value
    window:      tokens a "sliding" or "chunked" layer sees, else None
    softcap:     cap on the attention scores (Gemma 2), else None
    sinks:       True if the layer has learned sink logits (gpt-oss)
    shared_with: index of the layer whose keys and values this one reuses, else None
    scale:       factor on the attention scores, None for key_dim ** -0.5
    """

    kind: LayerKind
    num_q_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    shared_with: int | None = None
    scale: float | None = None

    @property
    def is_budgeted(self) -> bool:
        return self.kind == "full" and self.shared_with is None
