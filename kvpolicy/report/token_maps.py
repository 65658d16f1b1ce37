"""Maps of tokens by heads as one PNG. Import this module only where something is drawn: matplotlib takes a second."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.patches import Rectangle
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool1d

from kvpolicy.model.spec import ModelSpec
from kvpolicy.report.canvas import canvas, png

_MOST, _LEAST = "#d55e00", "#000000"  # vermilion and black: apart without colour vision too
_HEAD = 0.22  # inches
_MOST_ROWS = 256


def shown_layers(spec: ModelSpec) -> list[int]:
    """The first, the middle and the last budgeted layer, as numbers among the budgeted ones."""
    last = spec.num_budgeted_layers - 1
    return sorted({0, last // 2, last})


def token_maps_png(maps: Sequence[Tensor], per_head: Tensor, spec: ModelSpec, measure: str, title: str) -> bytes:
    """A row of panels for each prompt, a column for each of three layers; tokens go down, query heads to the right.

    maps:     `[L, num_q_heads, n]` of each prompt
    per_head: importance `[L, H]`, whose most and least important KV head of a layer are outlined
    measure:  what a cell holds
    """
    layers = shown_layers(spec)
    heights = [min(3.6, max(2.2, values.shape[-1] / 90)) for values in maps]
    width = max(1.9, _HEAD * spec.num_q_heads)
    figure = canvas(len(layers) * (width + 0.6) + 1.3, sum(heights) + 0.9 * len(maps) + 0.4, title)
    rows = figure.subplots(len(maps), len(layers), squeeze=False, height_ratios=heights)
    low = min(0.0, *(float(values[layers].min()) for values in maps))
    for row, values in zip(rows, maps, strict=True):
        for axes, layer in zip(row, layers, strict=True):
            image = _cells(axes, values[layer], low)
            axes.set_title(f"layer {spec.budgeted_layers[layer]}, {values.shape[-1]} tokens", fontsize=9)
            _heads(axes, per_head[layer], spec.group_size)
        averaged = values.shape[-1] > _MOST_ROWS
        row[0].set_ylabel("token (means of neighbours)" if averaged else "token", fontsize=9)
    figure.colorbar(image, ax=rows, label=measure, aspect=40, pad=0.02)
    most, least = (Rectangle((0, 0), 1, 1, **_style(color)) for color in (_MOST, _LEAST))
    labels = ["most important KV head of the layer", "least important"]
    figure.legend([most, least], labels, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    return png(figure)


def _cells(axes: Any, values: Tensor, low: float) -> Any:
    """values: `[num_q_heads, n]`; where there are more tokens than rows of pixels, neighbours are averaged."""
    heads, tokens = values.shape
    rows = adaptive_avg_pool1d(values, min(tokens, _MOST_ROWS)).T.numpy()
    borders = (-0.5, heads - 0.5, tokens - 0.5, -0.5)
    look = {"aspect": "auto", "interpolation": "nearest", "cmap": "cividis"}
    return axes.imshow(rows, extent=borders, vmin=low, vmax=1.0, **look)


def _heads(axes: Any, importance: Tensor, group: int) -> None:
    """Names the KV heads below their query heads, and outlines the most and the least important one."""
    heads = len(importance)
    axes.set_xticks([group * (head + 0.5) - 0.5 for head in range(heads)], [str(head) for head in range(heads)])
    axes.tick_params(labelsize=8)
    axes.set_xlabel("KV head (its query heads side by side)", fontsize=8)
    for head in range(1, heads):
        axes.axvline(group * head - 0.5, color="white", linewidth=1.5)
    low, high = axes.get_ylim()
    for head, color in ((int(importance.argmin()), _LEAST), (int(importance.argmax()), _MOST)):
        corner, size = (group * head - 0.44, min(low, high)), (group - 0.12, abs(high - low))
        axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor="white", linewidth=4.5, clip_on=False))
        axes.add_patch(Rectangle(corner, *size, clip_on=False, **_style(color)))


def _style(color: str) -> dict[str, Any]:
    return {"fill": False, "edgecolor": color, "linewidth": 2.5, "linestyle": "-" if color == _MOST else "--"}
