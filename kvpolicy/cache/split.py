"""Run-time allocation: a budget split by the scores of the prompt at hand, over a layer's heads or over the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvpolicy.budget.apportion import apportion
from kvpolicy.cache.schedule import Schedule
from kvpolicy.errors import BudgetError
from kvpolicy.model.spec import Budget
from kvpolicy.plugins import plugin_call
from kvpolicy.plugins.activations import LayerStatistics
from kvpolicy.plugins.roles import BudgetAllocator


@dataclass(frozen=True, slots=True)
class RuntimeSplit:
    """The tables of a batch, layer by layer.

    allocator: its `split_scope` is "layer" (every layer gets the same total) or "model"
    schedule:  how many entries there are in all; its own shares are not used
    floor:     least entries of a KV head

    Raises `BudgetError` for an allocator that splits nothing.
    """

    allocator: BudgetAllocator
    schedule: Schedule
    floor: int

    def __post_init__(self) -> None:
        if plugin_call.admitted(self.allocator).split_scope == "none":
            raise BudgetError(
                f"{type(self.allocator).__name__} does not split at run time (its split_scope is 'none'): "
                "use its shares in a schedule"
            )

    def with_floor(self, floor: int) -> RuntimeSplit:
        """The same with at least `floor` entries for each KV head."""
        return replace(self, floor=max(floor, self.floor))

    def start(self, before: Tensor | None) -> Tensor:
        """The table before the first layer of a forward has been scored, int64 [L, H]; before: that until now."""
        return torch.full(self.schedule.shape, self.floor) if before is None else before.clone()

    def at_layer(
        self,
        layer: int,
        scores: Sequence[Tensor],
        statistics: Sequence[LayerStatistics],
        seen: int,
        before: Tensor | None,
        now: Sequence[Tensor],
    ) -> list[Tensor]:
        """The tables of b sequences after layer l has been scored, int64 [L, H] each.

        scores: float32 [b, H, n] of layers 0 to l, under the scope "layer" of l alone; inf for entries that stay
            anyhow, -inf for absent ones
        statistics: of the attention of the same layers, [b, H]
        before: [L, H] before this forward, the same for all; capacities do not fall below it
        now:    [L, H] as this forward has left each. Layers 0 to l - 1 may only shrink, later ones are at their floor.
        """
        floors, most, total = self.start(before), self._most(seen, now[0]), self.schedule.total(seen)
        if self.split_is_per_layer:  # all sequences at once: the device is waited for once
            one = slice(layer, layer + 1)
            parts = self._apportion(
                scores, statistics, self._part(total, layer), floors[one], floors[one].clamp(min=most)
            )
            return [
                torch.cat([table[:layer], part, table[layer + 1 :]]) for table, part in zip(now, parts, strict=True)
            ]
        left, tables = total - int(floors[layer + 1 :].sum()), []  # later layers get their floor in any case
        for row, table in enumerate(now):
            ceilings = table[: layer + 1].clone()  # what earlier layers have evicted does not return
            ceilings[layer] = ceilings[layer].clamp(min=most)  # this one has not evicted yet
            own = [scored[row : row + 1] for scored in scores]
            own_statistics = [item.of_rows([row]) for item in statistics]
            (part,) = self._apportion(own, own_statistics, left, floors[: layer + 1], ceilings)
            tables.append(torch.cat([part, table[layer + 1 :]]))
        return tables

    @property
    def split_is_per_layer(self) -> bool:
        """Whether every layer is split by itself."""
        return self.allocator.split_scope == "layer"

    def grown(self, table: Tensor, seen: int) -> Tensor:
        """The table after decoding up to `seen` tokens: the proportions of the prompt, under a larger total."""
        # a capacity above the tokens seen stays: none ever falls
        total, ceilings = self.schedule.total(seen), table.clamp(min=self._most(seen, table))
        if not self.split_is_per_layer:
            return _apportion_within(table.double(), total, table, ceilings)
        parts = [
            _apportion_within(table[one].double(), self._part(total, layer), table[one], ceilings[one])
            for layer in range(len(table))
            for one in [slice(layer, layer + 1)]
        ]
        return torch.cat(parts)

    def _part(self, total: int, layer: int) -> int:
        """A layer's part of the total, where layers get the same."""
        layers = self.schedule.shape[0]
        return total // layers + (layer < total % layers)

    def _most(self, seen: int, table: Tensor) -> int:
        """Most entries of a KV head: the tokens seen, or the mean while there are fewer."""
        return max(seen, -(-self.schedule.total(seen) // table.numel()), self.floor)

    def _apportion(
        self,
        scores: Sequence[Tensor],
        statistics: Sequence[LayerStatistics],
        total: int,
        floors: Tensor,
        ceilings: Tensor,
    ) -> list[Tensor]:
        """A table for each sequence, int64 like `floors`. scores: float32 [b, H, n] of each of its layers."""
        # the ceilings may have room for less: shrunk layers, or a prompt shorter than the budget
        budget = Budget(min(total, int(ceilings.sum())), (len(ceilings), int(ceilings.shape[1])), floors, ceilings)
        shares = plugin_call.split_shares(self.allocator, scores, budget, statistics)
        return [apportion(proportions, budget) for proportions in shares]


def _apportion_within(shares: Tensor, total: int, floors: Tensor, ceilings: Tensor) -> Tensor:
    total = min(total, int(ceilings.sum()))
    return apportion(shares, Budget(total, (len(floors), int(floors.shape[1])), floors, ceilings))
