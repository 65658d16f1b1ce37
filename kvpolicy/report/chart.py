"""Charts as SVG inside a page: points over an axis, lines, intervals; each point says its figures where one points."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvpolicy.report.page import text

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 420, 280, 58, 12, 10, 42
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#8a6d3b")


@dataclass(frozen=True, slots=True)
class Point:
    """said: what is shown where one points at it; low, high: its interval"""

    x: float
    y: float
    said: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Series:
    """Points in the order of their line; one that is not drawn joins nothing."""

    name: str
    points: tuple[Point, ...]
    has_line: bool = True


def chart(
    title: str, series: Sequence[Series], x_label: str, y_label: str, level: tuple[str, float] | None = None
) -> str:
    """A figure with its legend. level: name and height of a dotted line"""
    points = [point for each in series for point in each.points]
    heights = [y for point in points for y in (point.y, point.low, point.high) if y is not None]
    across = _Axis([point.x for point in points], _LEFT, _WIDTH - _RIGHT)
    up = _Axis([*heights, *([level[1]] if level else [])], _HEIGHT - _BOTTOM, _TOP)
    parts = [*_frame(across, up, x_label, y_label)]
    if level is not None:
        y = up.at(level[1])
        line = f'x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"'
        parts.append(f'<line {line} stroke="#000" stroke-dasharray="2 3"><title>{text(level[0])}</title></line>')
    legend = ""
    for index, each in enumerate(series):
        colour, is_hollow = _COLOURS[index % len(_COLOURS)], index // len(_COLOURS) % 2 == 1
        parts += _drawn(each, colour, is_hollow, across, up)
        fill = "" if is_hollow else f";background:{colour}"
        legend += f'<li><i style="border:2px solid {colour}{fill}"></i>{text(each.name)}</li>'
    legend += f"<li>dotted: {text(level[0])}</li>" if level else ""
    return (
        f'<figure class="chart"><figcaption>{text(title)}</figcaption>\n'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{text(title)}" font-size="11" '
        f'font-family="system-ui, sans-serif">\n'
        + "\n".join(parts)
        + f'\n</svg>\n<ul class="legend">{legend}</ul></figure>'
    )


class _Axis:
    """Values to places, with a margin at both ends, and ticks at round numbers, at whole ones where all values are."""

    def __init__(self, values: Iterable[float], begin: float, end: float) -> None:
        found = [value for value in values if math.isfinite(value)] or [0.0]
        low, high = min(found), max(found)
        margin = 0.05 * (high - low) or abs(high) / 10 or 1.0
        self._low, self._span, self._begin, self._end = low - margin, high - low + 2 * margin, begin, end
        self._least_step = 1.0 if all(float(value).is_integer() for value in found) else 0.0

    def at(self, value: float) -> float:
        return self._begin + (value - self._low) / self._span * (self._end - self._begin)

    def ticks(self) -> list[float]:
        step = 10 ** math.floor(math.log10(self._span / 3))
        step *= next(factor for factor in (1, 2, 5, 10) if self._span / (step * factor) <= 6)
        step = max(step, self._least_step)
        first = math.ceil(self._low / step)
        return [number * step for number in range(first, math.floor((self._low + self._span) / step) + 1)]


def _frame(across: _Axis, up: _Axis, x_label: str, y_label: str) -> Iterable[str]:
    floor, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    for value in up.ticks():
        y = up.at(value)
        yield f'<line x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e3e3e3"/>'
        yield f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end" fill="#444">{value:.6g}</text>'
    for value in across.ticks():
        yield f'<text x="{across.at(value):.1f}" y="{floor + 15}" text-anchor="middle" fill="#444">{value:.6g}</text>'
    yield f'<path d="M{_LEFT} {_TOP}V{floor}H{right}" fill="none" stroke="#888"/>'
    middle = (_LEFT + right) / 2
    yield f'<text x="{middle}" y="{_HEIGHT - 8}" text-anchor="middle" fill="#222">{text(x_label)}</text>'
    turned = f'transform="translate(13 {(floor + _TOP) / 2}) rotate(-90)"'
    yield f'<text {turned} text-anchor="middle" fill="#222">{text(y_label)}</text>'


def _drawn(series: Series, colour: str, is_hollow: bool, across: _Axis, up: _Axis) -> Iterable[str]:
    """is_hollow: with empty points and a broken line, for colours that come again"""
    places = [(across.at(point.x), up.at(point.y)) for point in series.points]
    fill, dashes = ("#fff", ' stroke-dasharray="5 3"') if is_hollow else (colour, "")
    if series.has_line and len(places) > 1:
        way = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        yield f'<path d="M{way}" fill="none" stroke="{colour}" stroke-width="1.6"{dashes}/>'
    for point, (x, y) in zip(series.points, places, strict=True):
        if point.low is not None and point.high is not None:
            way = f"M{x:.1f} {up.at(point.low):.1f}V{up.at(point.high):.1f}"
            yield f'<path d="{way}" stroke="{colour}" stroke-opacity="0.55"/>'
        said = f"<title>{text(f'{series.name}: {point.said}')}</title>"
        look = f'r="3.4" fill="{fill}" stroke="{colour}" stroke-width="1.4"'
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" {look}>{said}</circle>'
