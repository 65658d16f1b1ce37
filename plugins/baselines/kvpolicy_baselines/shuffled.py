"""Shuffled: another estimator's values in the wrong places. The control for importance.

No paper. Budgets that are uneven but say nothing about the heads: a method that does not beat its own shuffled values
gains by unevenness alone, not by knowing which heads matter.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from kvpolicy import Importance, ImportanceEstimator, ModelProbe, ModelSpec, registry


@dataclass(frozen=True, slots=True)
class ShuffledEstimator(ImportanceEstimator):
    """The values of another estimator, permuted over all KV heads of the model, and those of layers over the layers.

    estimator:        the name of the other estimator
    estimator_params: its parameters; those that are missing keep their defaults
    seed:             another seed, other places

    Raises `PluginError` for an estimator or parameters that do not exist.
    """

    estimator: str = "cosine"
    estimator_params: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def num_forwards(self, spec: ModelSpec, *, prompts: int, sequences: int) -> int:
        return self._other().num_forwards(spec, prompts=prompts, sequences=sequences)

    def _other(self) -> ImportanceEstimator:
        other: ImportanceEstimator = registry.create("estimator", self.estimator, self.estimator_params)
        return other

    def estimate(self, probe: ModelProbe) -> Importance:
        known = self._other().estimate(probe)
        generator = torch.Generator().manual_seed(self.seed % 2**63)
        heads = torch.randperm(known.per_head.numel(), generator=generator)
        layers = torch.randperm(len(known.per_head), generator=generator)
        curves = known.curves
        return Importance(
            per_head=known.per_head.flatten()[heads].reshape(known.per_head.shape),
            per_layer=None if known.per_layer is None else known.per_layer[layers],
            curves=None if curves is None else curves.flatten(0, 1)[heads].reshape(curves.shape),
            curve_capacities=known.curve_capacities,
        )
