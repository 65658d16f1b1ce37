"""Heat maps of layers and KV heads as HTML: a cell says its number where one points, and shows it if it can."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kvpolicy.report.page import text
from kvpolicy.report.shades import Shade

_MOST_NUMBERS = 16  # KV heads whose numbers fit into their cells


def heat_cells(title: str, values: Tensor, layers: Sequence[int], shade: Shade, unit: str) -> str:
    """values: `[L, H]`; layers: their model layer indices; shade: their colours; unit: what a number is"""
    heads = values.shape[1]
    small = heads > _MOST_NUMBERS
    numbers = range(heads)
    head = "".join(f"<th>{number if not small or number % 8 == 0 else ''}</th>" for number in numbers)
    rows = []
    for layer, row in zip(layers, values.tolist(), strict=True):
        cells = "".join(_cell(layer, number, value, shade, unit, small) for number, value in enumerate(row))
        rows.append(f"<tr><th>{layer}</th>{cells}</tr>")
    kind = "heat small" if small else "heat"
    return (
        f'<figure><figcaption>{text(title)}</figcaption><div class="wide"><table class="{kind}">\n'
        f"<tr><th>layer</th>{head}</tr>\n" + "\n".join(rows) + "\n</table></div></figure>"
    )


def _cell(layer: int, number: int, value: float, shade: Shade, unit: str, small: bool) -> str:
    (red, green, blue), bright = shade.of(value)
    style = f"background:#{red:02x}{green:02x}{blue:02x}" + ("" if bright else ";color:#fff")
    said = text(f"layer {layer}, KV head {number}: {value:.3g} {unit}")
    return f'<td style="{style}" title="{said}">{"" if small else f"{value:.2f}"}</td>'
