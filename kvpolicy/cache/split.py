"""Run-time allocation: a budget split by the scores of the prompt at hand, over a layer's heads or over the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvpolicy.apportion import apportion
from kvpolicy.cache.schedule import Fixed, Growing
from kvpolicy.errors import BudgetError
from kvpolicy.interfaces import BudgetAllocator
from kvpolicy.spec import Budget


@dataclass(frozen=True, slots=True)
class RuntimeSplit:
    """One sequence at a time, layer by layer.

    allocator: its `split_scope` is "layer" or "model"
    schedule:  how many entries there are in all; its own shares are not used
    floor:     least entries of a KV head
    """

    allocator: BudgetAllocator
    schedule: Growing | Fixed
    floor: int

    def at_layer(self, scores: Sequence[Tensor], seen: int, held: Tensor | None, now: Tensor) -> Tensor:
        """The table after one more layer has been scored, int64 [L, H].

        scores: float32 [1, H, n] of layers 0 to l, -inf where absent
        held:   [L, H] before this forward; capacities do not fall below it
        now:    [L, H] as this forward has left it, rows 0 to l - 1 filled in. They may only shrink.
        """
        layer, (layers, heads) = len(scores) - 1, self.schedule.shape
        most = seen if held is None else max(seen, int(held.max()))
        floors = torch.full((layers, heads), min(self.floor, most)) if held is None else held
        table = now.clone()
        if self.allocator.split_scope == "layer":
            total = self._total(seen)
            part = total // layers + (layer < total % layers)
            ceilings = torch.full((1, heads), most)
            table[layer] = self._apportion(scores[-1:], part, floors[layer : layer + 1], ceilings)[0]
            return table
        total = self._total(seen) - int(floors[layer + 1 :].sum())
        ceilings = torch.cat([now[:layer], torch.full((1, heads), most)])
        table[: layer + 1] = self._apportion(scores, total, floors[: layer + 1], ceilings)
        return table

    def grown(self, table: Tensor, seen: int) -> Tensor:
        """The table after decoding up to `seen` tokens: the proportions of the prompt, under a larger total."""
        total = max(self._total(seen), int(table.sum()))
        ceilings = table.clamp(min=seen)
        total = min(total, int(ceilings.sum()))
        return apportion(table.double(), Budget(total, self.schedule.shape, table, ceilings))

    def _total(self, seen: int) -> int:
        if isinstance(self.schedule, Growing):
            return self.schedule.total(seen)
        return int(self.schedule.table.sum())

    def _apportion(self, scores: Sequence[Tensor], total: int, floors: Tensor, ceilings: Tensor) -> Tensor:
        total = min(total, int(ceilings.sum()))
        budget = Budget(total, (len(ceilings), self.schedule.shape[1]), floors, ceilings)
        shares = self.allocator.split(scores, budget)
        expected = (1, *budget.shape)
        if tuple(shares.shape) != expected:
            raise BudgetError(
                f"{type(self.allocator).__name__}.split returned shape {tuple(shares.shape)}, expected {expected}"
            )
        return apportion(shares[0].cpu(), budget)
