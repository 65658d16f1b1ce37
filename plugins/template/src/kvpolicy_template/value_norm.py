"""A KV head matters as much as its values are long: long values move the residual stream more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvpolicy import Importance, ImportanceEstimator, LayerActivations, ModelProbe


@dataclass(frozen=True, slots=True)
class ValueNormEstimator(ImportanceEstimator):
    """Mean L2 norm of the values of a KV head, over all tokens of all prompts."""

    requires: ClassVar[frozenset[str]] = frozenset({"values"})

    def estimate(self, probe: ModelProbe) -> Importance:
        total = torch.zeros(probe.spec.table_shape)
        tokens = torch.zeros(probe.spec.num_budgeted_layers, 1)

        def add(activations: LayerActivations) -> None:
            norms = activations.values.float().norm(dim=-1)  # [B, H, n]
            total[activations.layer] += norms.sum((0, 2)).cpu()
            tokens[activations.layer] += norms.shape[0] * norms.shape[2]

        probe.observe(add, self.requires)
        return Importance(per_head=total / tokens.clamp(min=1))
