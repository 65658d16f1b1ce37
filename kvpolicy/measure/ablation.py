"""What it costs to shrink one layer: a measured layer importance, to hold an estimator's against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvpolicy.measure.ranks import chance_correlation, rank_correlation
from kvpolicy.model.spec import Importance, ModelSpec
from kvpolicy.plugins.roles import ModelProbe
from kvpolicy.progress import Progress

PART = 1 / 8
"""Of the context: what the KV heads of the shrunk layer keep."""


@dataclass(frozen=True, slots=True, eq=False)
class LayerAblation:
    """Losses with one budgeted layer after another shrunk, all others keeping everything.

    capacity: entries that each KV head of the shrunk layer keeps
    context:  tokens of a sequence
    full:     float64 `[N]`, loss of each sequence with nothing evicted, nats per scored token
    shrunk:   float64 `[L, N]`, with this layer shrunk
    """

    capacity: int
    context: int
    full: Tensor
    shrunk: Tensor

    @property
    def increase(self) -> Tensor:
        """float64 `[L]`: mean loss with the layer shrunk minus the full one; below 0 where shrinking helped."""
        return (self.shrunk - self.full).mean(1)

    def document(self, importance: Importance) -> dict[str, Any]:
        """As JSON holds it, with the rank correlation of each importance of a layer."""
        return {
            "capacity": self.capacity,
            "sequences": len(self.full),
            "loss_full": float(self.full.mean()),
            "loss_increase": self.increase.tolist(),
            "measure": "Spearman's rank correlation",
            "by_chance": chance_correlation(len(self.shrunk)),
            "correlation": {
                name: None if (rank := rank_correlation(values, self.increase)) != rank else rank
                for name, values in layer_importance(importance).items()
            },
        }


def num_forwards(spec: ModelSpec, sequences: int) -> int:
    """Forwards of one sequence that `ablate_layers` runs."""
    return sequences * (1 + spec.num_budgeted_layers)


def ablate_layers(probe: ModelProbe, progress: Progress) -> LayerAblation:
    """One loss with nothing evicted, and one for each budgeted layer with all its KV heads at an eighth."""
    context = probe.context_length
    capacity = min(max(round(PART * context), probe.least_capacity), context)
    tables = [torch.full(probe.spec.table_shape, context)]
    for layer in range(probe.spec.num_budgeted_layers):
        tables.append(tables[0].clone())
        tables[-1][layer] = capacity
    losses = []
    progress.begin("layers", len(tables))
    try:
        for table in tables:
            losses.append(probe.loss(table))
            progress.advance()
    finally:
        progress.end()
    return LayerAblation(capacity, context, losses[0], torch.stack(losses[1:]))


def layer_importance(importance: Importance) -> dict[str, Tensor]:
    """What an estimator says of layers, `[L]` each: its own layer importance if it has one, and the mean over heads."""
    own = {} if importance.per_layer is None else {"per_layer": importance.per_layer}
    return {**own, "mean of per_head": importance.per_head.mean(1)}
