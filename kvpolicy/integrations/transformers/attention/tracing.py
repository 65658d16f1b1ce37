"""What torch.compile is not to look into."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """A function that runs as it is inside compiled code: it counts tokens, which a compiler takes for constants."""
    hidden: Callable[P, R] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]  # of torch

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return (hidden if torch.compiler.is_compiling() else function)(*args, **kwargs)

    return call
