"""A needle at every depth of contexts of several lengths: the usual picture of what a cache still finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvpolicy.errors import PluginError
from kvpolicy.plugins.task_role import Sample, Task, Turn
from kvpolicy.tasks.fitting import drawer
from kvpolicy.tasks.metrics import contained_part
from kvpolicy.tasks.needle_lines import NEEDLES, needle_sample


@dataclass(frozen=True, slots=True)
class NeedleGridTask(Task):
    """One number in filler, at `depths` depths of `lengths` lengths; `depths * lengths` samples fill the grid once.

    The lengths are equal parts of the one that is asked for, which is the last; depths go from the beginning to the
    end.
    """

    depths: int = 5
    lengths: int = 4

    def __post_init__(self) -> None:
        if self.depths < 2 or self.lengths < 1:
            raise PluginError(f"a grid has 2 depths and 1 length at least, got {self.depths} and {self.lengths}")

    @property
    def metric(self) -> str:  # type: ignore[override]
        return "contained_part"

    @property
    def max_new_tokens(self) -> int:
        return 16

    def samples(self, tokenizer: Any, count: int, length: int, seed: int) -> Sequence[Sample]:
        samples = []
        for index in range(count):
            part, depth = index % self.lengths + 1, index // self.lengths % self.depths / (self.depths - 1)
            whole = length * part // self.lengths
            sample = needle_sample(NEEDLES["niah_single_1"], tokenizer, whole, drawer(seed, index), depth=depth)
            samples.append(Sample(sample.context, sample.questions, sample.turns, {"depth": depth, "length": whole}))
        return samples

    def score(self, answer: str, turn: Turn) -> float:
        return contained_part(answer, turn.answers)
