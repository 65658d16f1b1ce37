"""What a search really ran, added up over the runs of a study."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import optuna
from torch import Tensor, nn

from kvpolicy.tuning.storage import settings_digest


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


@contextmanager
def metered(model: nn.Module, study: optuna.Study, what: str) -> Iterator[None]:
    """Counts what the model runs meanwhile and keeps it in the study as one entry of `what`, also when interrupted."""
    cost, begun = Cost(), time.monotonic()

    def count(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        ids: Tensor = named["input_ids"] if "input_ids" in named else given[0]
        cost.add(tokens=ids.numel(), forwards=len(ids))

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
        cost.add(seconds=time.monotonic() - begun)
        study.set_user_attr(f"{_prefix(study, what)}{uuid.uuid4().hex}", asdict(cost))


def known_cost(study: optuna.Study, what: str) -> dict[str, Any]:
    """The sum of the entries of `what`, of all runs that went into the study under its settings."""
    prefix, total = _prefix(study, what), Cost()
    for name, entry in study.user_attrs.items():
        if name.startswith(prefix):
            total.add(entry["tokens"], entry["forwards"], entry["seconds"])
    return asdict(total) | {"seconds": round(total.seconds, 3)}


def _prefix(study: optuna.Study, what: str) -> str:
    return f"kvpolicy_cost:{what}:{settings_digest(study)}:"
