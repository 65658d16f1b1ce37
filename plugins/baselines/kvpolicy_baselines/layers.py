"""What allocators by layer share."""

from __future__ import annotations

from torch import Tensor

from kvpolicy import Importance


def layer_importance(importance: Importance) -> Tensor:
    """Float64 `[L]`: what the estimator says about layers, or the mean of each layer's KV heads."""
    per_layer = importance.per_head.double().mean(1) if importance.per_layer is None else importance.per_layer
    return per_layer.double()
