"""A format for each layer, and capacities with it, by measured curves: the closed form of `tune --format auto`.

A multiple-choice knapsack, solved by a price. At a price of a byte every KV head takes the corner of its curve where
the next entry saves less than it costs, and every layer the format under which its heads lose and pay the least
together. The lowest price at which all of it goes into the bytes is found by bisection. What a price leaves unspent is
less than one step of one layer; it is for whoever apportions the budget.

What heads lose together depends on what all of them are given, so it is found in rounds: curves of each head alone
give a first choice, and then each round adds to them what a head lost beside the others as they were chosen, in the
mean over the rounds before it. The round that loses least in all is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvpolicy.errors import BudgetError

_STEPS = 60  # of the bisection: the price is then known to 18 digits
_ROUNDS = 12


@dataclass(frozen=True, slots=True, eq=False)
class FormatCurves:
    """What a format costs and loses.

    losses: float `[L, H, K]`, at K capacities
    cost:   bytes of an entry;  fixed: bytes of a layer besides
    least:  the fewest entries that a KV head may be given
    """

    losses: Tensor
    cost: int
    fixed: int
    least: int


@dataclass(frozen=True, slots=True, eq=False)
class FormatChoice:
    """formats: of each layer, by name;  capacities: int64 `[L, H]`;  loss: the sum of what the curves say
    curves: float `[L, H, K]`, what was chosen by, under each layer's format
    """

    formats: tuple[str, ...]
    capacities: Tensor
    loss: float
    curves: Tensor


def choose_formats(
    curves: Mapping[str, FormatCurves], capacities: Tensor, total: int, together: Tensor | None = None
) -> FormatChoice:
    """The formats and capacities that lose least by the curves and take `total` bytes at most: the optimum, but for
    what two heads lose together, which is counted in rounds.

    capacities: int64 `[K]`, ascending, where the curves have their points
    together:   as in `Importance`

    Raises `BudgetError` where not even the smallest go into the bytes.
    """
    best = choice = _alone(curves, capacities, total)
    if together is None:
        return best
    least, mean = torch.inf, torch.zeros_like(best.curves)
    for rounds in range(1, _ROUNDS + 1):
        place = torch.searchsorted(capacities, choice.capacities)
        others = lost_beside(together, place)
        own = torch.stack([curves[name].losses[layer] for layer, name in enumerate(choice.formats)])
        loss = float((own + others).gather(-1, place[..., None]).sum())
        if loss < least:
            least, best = loss, replace(choice, loss=loss)
        mean += (others - mean) / rounds
        beside = {name: replace(alone, losses=(alone.losses + mean).clamp(min=0)) for name, alone in curves.items()}
        choice = _alone(beside, capacities, total)
    return best


def lost_beside(together: Tensor, place: Tensor) -> Tensor:
    """`[L, H, K]`: what a head loses at each of its points beside the others. place: theirs, int64 `[L, H]`"""
    heads, points = place.numel(), together.shape[2]
    rows = together.reshape(heads * points, heads * points)
    return rows[:, torch.arange(heads) * points + place.flatten()].sum(1).reshape(together.shape[:3])


def _alone(curves: Mapping[str, FormatCurves], capacities: Tensor, total: int) -> FormatChoice:
    chosen = _at_price(curves, capacities, 0.0)
    if _bytes(curves, chosen) <= total:
        return chosen
    largest = max(float(own.losses.amax()) for own in curves.values())
    low, high = 0.0, max(largest, 1e-30)
    chosen = _at_price(curves, capacities, high)
    if (least := _bytes(curves, chosen)) > total:
        raise BudgetError(f"{total} bytes are fewer than the {least} that the smallest capacities take: give more")
    for _ in range(_STEPS):
        price = (low + high) / 2
        candidate = _at_price(curves, capacities, price)
        if _bytes(curves, candidate) <= total:
            high, chosen = price, candidate
        else:
            low = price
    return chosen


def _at_price(curves: Mapping[str, FormatCurves], capacities: Tensor, price: float) -> FormatChoice:
    names, spent, taken, lost = list(curves), [], [], []
    for own in curves.values():
        paid = own.losses.double() + price * own.cost * capacities
        allowed = capacities >= min(own.least, int(capacities[-1]))
        best = paid.masked_fill(~allowed, torch.inf).min(-1)
        spent.append(best.values.sum(-1) + price * own.fixed)
        taken.append(capacities[best.indices])
        lost.append(own.losses.double().gather(-1, best.indices[..., None])[..., 0].sum(-1))
    place = torch.stack(spent).argmin(0)  # [L]
    layers = torch.arange(len(place))
    return FormatChoice(
        tuple(names[index] for index in place.tolist()),
        torch.stack(taken)[place, layers],
        float(torch.stack(lost)[place, layers].sum()),
        torch.stack([curves[names[index]].losses[layer] for layer, index in enumerate(place.tolist())]),
    )


def _bytes(curves: Mapping[str, FormatCurves], choice: FormatChoice) -> int:
    rows = zip(choice.formats, choice.capacities.sum(-1).tolist(), strict=True)
    return sum(curves[name].cost * entries + curves[name].fixed for name, entries in rows)
