"""What a generation will weigh, from the model's configuration alone, whether it fits, and the most that does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kvpolicy.budget.entry_format import MODEL as MODEL_DTYPE
from kvpolicy.budget.entry_format import name_of, named
from kvpolicy.budget.memory_size import read_size
from kvpolicy.cache.select import MAX_TOKENS
from kvpolicy.defaults import MODEL, RETENTIONS
from kvpolicy.errors import ModelError
from kvpolicy.measure.machine import memory_bytes
from kvpolicy.measure.memory import MemoryEstimate, estimate_memory
from kvpolicy.model.spec import ModelSpec
from kvpolicy.plugins.registry import registry
from kvpolicy.verbs import arguments

_ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
_MOST_SEQUENCES = 2**20


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that fits: tokens of a sequence at the batch that was asked for, sequences at the context; 0 is none."""

    context: int
    batch: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes of weights, caches and activations at each retention, what the device has, and the most that fits.

    rows:         one for each retention
    limits:       of each row; None where the memory is not known
    full_limits:  of transformers' DynamicCache
    max_context:  tokens that the model was made for, where limits of contexts end; 0 where it does not say
    weights_note: what is to be known of the weights' bytes, None for nothing
    device:       what must be fitted into, in words
    device_bytes: all of its memory, None where the system does not say
    entry_format: the name of the entries' format
    """

    rows: tuple[MemoryEstimate, ...]
    limits: tuple[Limits, ...] | None
    full_limits: Limits | None
    max_context: int
    policy: str
    weights_note: str | None
    device: str
    device_bytes: int | None
    entry_format: str = MODEL_DTYPE

    def fits(self, row: MemoryEstimate) -> bool | None:
        """Whether all fits when it is largest, at the end of the prompt; None where the memory is not known."""
        return None if self.device_bytes is None else row.peak_bytes <= self.device_bytes

    def to_json(self) -> dict[str, Any] | list[dict[str, Any]]:
        """What `kvpolicy estimate --json` prints: an object for each retention, alone where there is one."""
        more = {
            "policy": self.policy,
            "format": self.entry_format,
            "weights_note": self.weights_note,
            "device": self.device,
            "device_bytes": self.device_bytes,
            "max_context": self.max_context,
            **_named("dynamic_largest", self.full_limits),
        }
        documents = [
            row.to_json() | more | _named("largest", limits) | {"fits": self.fits(row)}
            for row, limits in zip(self.rows, self.limits or [None] * len(self.rows), strict=True)
        ]
        return documents[0] if len(documents) == 1 else documents


def _named(prefix: str, limits: Limits | None) -> dict[str, int | None]:
    return {
        f"{prefix}_context": None if limits is None else limits.context,
        f"{prefix}_batch": None if limits is None else limits.batch,
    }


def estimate(
    model: str | Path = MODEL,
    *,
    context: int = 4096,
    retention: float | Sequence[float] | None = None,
    batch: int = 1,
    policy: str = "streaming",
    format: str | None = None,
    dtype: str = "bfloat16",
    gpu_memory: str | int | None = None,
    device: str = "auto",
    revision: str | None = None,
) -> Estimate:
    """What a generation will weigh, computed from the model's configuration, whether it fits, and the most that does.

    model:     a Hub id, a directory, a .gguf file, or the built-in smollm2-135m; no weights are read
    context:   tokens of one sequence, which are fed as one prompt
    retention: kept fractions, each in (0, 1]; None for 0.5, 0.3, 0.1
    batch:     sequences
    policy:    a registered name; most policies hold a score beside each entry
    format:    of the entries: "int8", "int4", "think"; None for `dtype`
    dtype:     of cache and weights: "float32", "bfloat16", "float16"
    gpu_memory: what it must fit into, such as "24GB" or a number of bytes; None for the memory of `device`
    device:    whose memory it must fit into, such as "cpu" or "cuda:1"; "auto" is a CUDA device if there is one
    revision:  branch, tag or commit on the Hub

    Raises `BudgetError`, `ModelError`, `PluginError`.
    """
    if dtype not in _ITEMSIZE:
        raise ModelError(f"dtype= must be one of {', '.join(_ITEMSIZE)}, got '{dtype}'")
    arguments.check_least(1, context=context, batch=batch)
    given = None if gpu_memory is None else read_size(gpu_memory)
    where = arguments.pick_device(device) if given is None else "given"
    memory = memory_bytes(where) if given is None else given
    evicting, entry_format = registry.create("policy", policy), named(format or MODEL_DTYPE)
    retentions = [arguments.check_retention(r) for r in arguments.several(retention) or RETENTIONS]

    from kvpolicy.integrations.transformers import activations_of, load_config, weights_of

    config = load_config(str(model), revision=revision)
    spec, itemsize = ModelSpec.from_config(config), _ITEMSIZE[dtype]
    weights, token_bytes = weights_of(config, itemsize), activations_of(config, itemsize)

    def weigh(kept: float, tokens: int, sequences: int) -> MemoryEstimate:
        return estimate_memory(
            spec, tokens, kept, sequences, itemsize, weights.nbytes, evicting, token_bytes, entry_format
        )

    def peak(kept: float | None, tokens: int, sequences: int) -> int:
        """None is DynamicCache."""
        weight = weigh(kept or 1.0, tokens, sequences)
        return weight.dynamic_peak_bytes if kept is None else weight.peak_bytes

    limits = None
    if memory is not None:
        most = min(spec.max_context or MAX_TOKENS, MAX_TOKENS)
        limits = [
            Limits(
                _largest(partial(peak, kept, sequences=batch), memory, most),
                _largest(partial(peak, kept, context), memory, _MOST_SEQUENCES),
            )
            for kept in (None, *retentions)
        ]
    rows = tuple(weigh(kept, context, batch) for kept in retentions)
    full_limits, own = (None, None) if limits is None else (limits[0], tuple(limits[1:]))
    return Estimate(
        rows, own, full_limits, spec.max_context, policy, weights.note, where, memory, name_of(entry_format)
    )


def _largest(peak: Callable[[int], int], memory: int, most: int) -> int:
    """The largest number up to `most` whose peak is at most `memory`, where peaks never fall; 0 if not even 1's is."""
    low, high = 0, 1
    while high <= most and peak(high) <= memory:
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if peak(middle) <= memory else (low, middle)
    return low
