"""Layer importance against measured losses as one PNG. Import this module only where something is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kvpolicy.measure.ablation import LayerAblation, layer_importance
from kvpolicy.measure.ranks import rank_correlation
from kvpolicy.model.spec import Importance
from kvpolicy.report.canvas import canvas, png

_UNEVEN = 5.0  # the largest over the median: beyond that most layers would lie on top of each other
_LABELS = {"per_layer": "layer importance", "mean of per_head": "mean importance of its KV heads"}


def layers_png(importance: Importance, measured: LayerAblation, layers: Sequence[int], title: str) -> bytes:
    """The measured increase of each layer, and below it over each importance that the estimator gives.

    layers: the model's numbers of the budgeted layers
    """
    measures = layer_importance(importance)
    increase = measured.increase
    figure = canvas(4.6 * max(2, len(measures)), 7.0, title)
    grid = figure.add_gridspec(2, len(measures), height_ratios=[3, 4])
    bars = figure.add_subplot(grid[0, :])
    bars.bar(range(len(layers)), increase.tolist(), color="#0072b2")
    bars.set_xticks(range(len(layers)), [str(layer) for layer in layers], fontsize=8)
    bars.set_xlabel("layer", fontsize=9)
    bars.set_ylabel("loss increase, nats per token", fontsize=9)
    part = f"{measured.capacity} of {measured.context} entries"
    bars.set_title(f"one layer at {part}, all others whole; {len(measured.full)} sequences", fontsize=10)
    bars.axhline(0.0, color="black", linewidth=0.8)
    for column, (name, values) in enumerate(measures.items()):
        _scatter(figure.add_subplot(grid[1, column]), values, increase, layers, _LABELS[name])
    return png(figure)


def _scatter(axes: Any, values: Tensor, increase: Tensor, layers: Sequence[int], name: str) -> None:
    axes.scatter(values.tolist(), increase.tolist(), s=14, color="#0072b2")
    for x, y, layer in zip(values.tolist(), increase.tolist(), layers, strict=True):
        axes.annotate(str(layer), (x, y), xytext=(3, 3), textcoords="offset points", fontsize=7)
    correlation = rank_correlation(values, increase)
    ranks = "no ranking" if correlation != correlation else f"rank correlation {correlation:+.2f}"
    axes.set_title(f"{ranks}, {len(layers)} layers", fontsize=10)
    is_uneven = float(values.min()) > 0 and float(values.max()) > _UNEVEN * float(values.median())
    axes.set_xscale("log" if is_uneven else "linear")
    axes.set_xlabel(f"{name}, on a log scale" if is_uneven else name, fontsize=9)
    axes.set_ylabel("loss increase, nats per token", fontsize=9)
    axes.grid(alpha=0.3)
    axes.margins(0.1)
