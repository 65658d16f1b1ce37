"""What differs between the releases of transformers, and which of them the tests were run with."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import transformers
from torch import nn
from transformers.generation.utils import GenerationMixin

from kvpolicy.errors import VersionWarning

TESTED = ("5.17", "5.24")
"""The oldest and the newest minor release that the tests were run with. The oldest stands in pyproject.toml too."""

CACHE_NAMES = ("cache", "past_key_values")
"""The names of the argument that takes a cache, the newest first: 5.24 renamed it."""


def with_cache(module: nn.Module, cache: Any) -> dict[str, Any]:
    """The keyword arguments that hand a cache to a call of this module."""
    return {cache_name(type(module).forward): cache}


def generate_with_cache(cache: Any) -> dict[str, Any]:
    """The keyword arguments that hand a cache to `model.generate`."""
    return {_generate_name(): cache}


@functools.lru_cache(maxsize=256)
def cache_name(forward: Callable[..., Any]) -> str:
    """The name under which a forward takes its cache; of one that only hands arguments on, that of generate."""
    taken = inspect.signature(forward).parameters
    return next((name for name in CACHE_NAMES if name in taken), None) or _generate_name()


@functools.cache
def _generate_name() -> str:
    taken = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    return next(name for name in CACHE_NAMES if name in taken)


@functools.cache
def warn_if_untested() -> None:
    """Tells, once, that this release is newer than the newest that was tested."""
    newest = tuple(map(int, TESTED[1].split(".")))
    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) > newest:
        warnings.warn(
            f"transformers {transformers.__version__} is newer than {TESTED[1]}, the newest release that kvpolicy was "
            "tested with; if anything looks wrong, compare with that one",
            VersionWarning,
            stacklevel=3,
        )
