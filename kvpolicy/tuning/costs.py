"""What a search really ran."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(slots=True)
class Cost:
    """tokens:   that went through the model, forward
    forwards: of one row each
    seconds:  of waiting, everything included
    """

    tokens: int = 0
    forwards: int = 0
    seconds: float = 0.0

    def add(self, tokens: int = 0, forwards: int = 0, seconds: float = 0.0) -> None:
        self.tokens += tokens
        self.forwards += forwards
        self.seconds += seconds

    @property
    def facts(self) -> dict[str, Any]:
        """For a plan's provenance: time to the millisecond."""
        return asdict(self) | {"seconds": round(self.seconds, 3)}


@contextmanager
def metered(model: nn.Module, keep: Callable[[Cost], None]) -> Iterator[None]:
    """Counts what the model runs meanwhile, and has it kept at the end, also when interrupted."""
    cost, start = Cost(), time.monotonic()

    def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids: Tensor = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        cost.add(tokens=ids.numel(), forwards=len(ids))

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
        cost.add(seconds=time.monotonic() - start)
        keep(cost)
