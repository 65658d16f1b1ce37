"""One picture as PNG. Import this module only where something is drawn: matplotlib takes a second."""

from __future__ import annotations

import io
import textwrap

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kvpolicy.files.plain import plain

_DPI = 130


def canvas(width: float, height: float, title: str) -> Figure:
    """An empty picture of so many inches below its title, which is broken into lines that fit."""
    lines = [line for part in plain(title).split("\n") for line in textwrap.wrap(part, max(24, int(11 * width)))]
    figure = Figure(figsize=(width, height + 0.22 * len(lines)), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle("\n".join(lines), fontsize=11, parse_math=False)
    return figure


def png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()
