"""Sensitivity: what the loss does when one KV head alone is shrunk.

No paper of its own: a measured importance instead of a proxy. Its curves are what LU-KV (arXiv:2602.08585) takes its
convex hulls of, with the model's loss in place of that paper's attention oracle.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from kvpolicy import Importance, ImportanceEstimator, ModelProbe, ModelSpec, PluginError


@dataclass(frozen=True, slots=True)
class SensitivityEstimator(ImportanceEstimator):
    """Importance of a KV head = the mean loss with it alone shrunk, minus the mean loss with nothing evicted, >= 0.

    sizes:      parts of the context a KV head is shrunk to, each in (0, 1); one loss for every head and size
    size:       one of them: importance is the increase there, the curves hold all
    max_groups: above so many KV heads in the model, neighbours in a layer are shrunk together and share the increase

    The curves hold the mean losses as measured, with the full context as their last point. A capacity is never below
    the probe's least one; sizes that come out alike are measured once.
    """

    sizes: tuple[float, ...] = (0.03125, 0.125, 0.5)
    size: float = 0.125
    max_groups: int = 256

    def __post_init__(self) -> None:
        if not self.sizes or not all(0 < size < 1 for size in self.sizes) or self.size not in self.sizes:
            raise PluginError(
                "sensitivity: sizes must be parts of the context in (0, 1) and size one of them, got "
                f"{list(self.sizes)} and {self.size}"
            )
        if self.max_groups < 1:
            raise PluginError(f"sensitivity: max_groups must be at least 1, got {self.max_groups}")

    def estimate(self, probe: ModelProbe) -> Importance:
        context, width = probe.context_length, self._width(probe.spec)
        capacity = {size: min(max(round(size * context), probe.least_capacity), context) for size in self.sizes}
        points = sorted({*capacity.values(), context})
        nothing_evicted = torch.full(probe.spec.table_shape, context)
        full = _mean_loss(probe, nothing_evicted)
        curves = torch.full((*probe.spec.table_shape, len(points)), full, dtype=torch.float64)
        for layer, heads in _groups(probe.spec, width):
            for place, point in enumerate(points[:-1]):
                table = nothing_evicted.clone()
                table[layer, heads] = point
                increase = _mean_loss(probe, table) - full
                curves[layer, heads, place] += increase / (heads.stop - heads.start)
        per_head = (curves[..., points.index(capacity[self.size])] - full).clamp(min=0)
        return Importance(per_head.float(), curves=curves.float(), curve_capacities=torch.tensor(points))

    def num_forwards(self, spec: ModelSpec, *, prompts: int, sequences: int) -> int:
        groups = len(_groups(spec, self._width(spec)))
        return sequences * (1 + groups * len(set(self.sizes)))

    def _width(self, spec: ModelSpec) -> int:
        """The fewest neighbours to a group with which there are at most `max_groups`, or all heads of a layer."""
        layers, heads = spec.table_shape
        return next((x for x in range(1, heads) if layers * ceil(heads / x) <= self.max_groups), heads)


def _groups(spec: ModelSpec, width: int) -> list[tuple[int, slice]]:
    """(layer, its KV heads) of every group; the last one of a layer may be narrower."""
    layers, heads = spec.table_shape
    return [
        (layer, slice(first, min(first + width, heads))) for layer in range(layers) for first in range(0, heads, width)
    ]


def _mean_loss(probe: ModelProbe, capacities: Tensor) -> float:
    return float(probe.loss(capacities).mean())
