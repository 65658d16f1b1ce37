"""The colours of heat maps, wherever they are drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

Colour = tuple[int, int, int]
_LESS, _EVEN, _MORE = (33, 102, 172), (247, 247, 247), (178, 24, 43)
_NOTHING, _MUCH = (255, 255, 255), (0, 90, 50)


@dataclass(frozen=True, slots=True)
class Shade:
    """place: a value to 0 to 1 along the colours"""

    place: Callable[[float], float]
    colours: Sequence[Colour]

    def of(self, value: float) -> tuple[Colour, bool]:
        """The colour of a value, and whether it is so bright that a number on it is black."""
        steps, place = len(self.colours) - 1, min(1.0, max(0.0, self.place(value)))
        index = min(int(place * steps), steps - 1)
        weight = place * steps - index
        low, high = self.colours[index], self.colours[index + 1]
        red, green, blue = (round(a + weight * (b - a)) for a, b in zip(low, high, strict=True))
        return (red, green, blue), 0.3 * red + 0.59 * green + 0.11 * blue > 140


def budget_shade() -> Shade:
    """Of multiples of uniform: blue is less, red is more, four times either way is full colour."""
    return Shade(lambda value: 0.5 + 0.25 * math.log2(value) if value > 0 else 0.0, (_LESS, _EVEN, _MORE))


def importance_shade(relative: Tensor) -> Shade:
    """From none (white) to the largest (green)."""
    peak = float(relative.max()) or 1.0
    return Shade(lambda value: value / peak, (_NOTHING, _MUCH))


def relative_importance(per_head: Tensor) -> Tensor:
    """`[L, H]` as multiples of its mean."""
    return per_head / (float(per_head.mean()) or 1.0)
