"""What a cache will weigh, from the model's configuration alone, and whether it fits on a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvpolicy.defaults import MODEL, RETENTIONS
from kvpolicy.errors import ModelError
from kvpolicy.measure.machine import memory_bytes
from kvpolicy.measure.memory import MemoryEstimate, estimate_memory
from kvpolicy.model.spec import ModelSpec
from kvpolicy.plugins.registry import registry
from kvpolicy.verbs import arguments

_ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes of weights and caches at each retention, and what the device has.

    rows:         one for each retention
    weights_note: what is to be known of the weights' bytes, None for nothing
    device_bytes: all of the device's memory, None where the system does not say
    """

    rows: tuple[MemoryEstimate, ...]
    policy: str
    weights_note: str | None
    device: str
    device_bytes: int | None

    def fits(self, row: MemoryEstimate) -> bool | None:
        """Whether weights and caches fit at their largest, behind a prompt; None where the memory is not known."""
        if self.device_bytes is None:
            return None
        return (row.weights_bytes or 0) + row.prefill_peak_bytes <= self.device_bytes

    def to_json(self) -> dict[str, Any] | list[dict[str, Any]]:
        """What `kvpolicy estimate --json` prints: an object for each retention, alone where there is one."""
        more = {
            "policy": self.policy,
            "weights_note": self.weights_note,
            "device": self.device,
            "device_bytes": self.device_bytes,
        }
        documents = [row.to_json() | more | {"fits": self.fits(row)} for row in self.rows]
        return documents[0] if len(documents) == 1 else documents


def estimate(
    model: str | Path = MODEL,
    *,
    context: int = 4096,
    retention: float | Sequence[float] | None = None,
    batch: int = 1,
    policy: str = "streaming",
    dtype: str = "bfloat16",
    device: str = "auto",
    revision: str | None = None,
) -> Estimate:
    """What a cache will weigh, kept and full, computed from the model's configuration, and whether it fits on a device.

    model:     a Hub id, a directory, a .gguf file, or the built-in smollm2-135m; no weights are read
    context:   tokens of one sequence
    retention: kept fractions, each in (0, 1]; None for 0.5, 0.3, 0.1
    batch:     sequences
    policy:    a registered name; most policies hold a score beside each entry
    dtype:     of cache and weights: "float32", "bfloat16", "float16"
    device:    whose memory it must fit in, such as "cpu" or "cuda:1"; "auto" is a CUDA device if there is one
    revision:  branch, tag or commit on the Hub

    Activations are not counted. Raises `BudgetError`, `ModelError`, `PluginError`.
    """
    if dtype not in _ITEMSIZE:
        raise ModelError(f"dtype= must be one of {', '.join(_ITEMSIZE)}, got '{dtype}'")
    arguments.check_least(1, context=context, batch=batch)
    where = arguments.pick_device(device)
    evicting = registry.create("policy", policy)
    retentions = [arguments.check_retention(r) for r in arguments.several(retention) or RETENTIONS]

    from kvpolicy.integrations.transformers import load_config, weights_of

    config = load_config(str(model), revision=revision)
    spec, itemsize = ModelSpec.from_config(config), _ITEMSIZE[dtype]
    weights = weights_of(config, itemsize)
    rows = [estimate_memory(spec, context, kept, batch, itemsize, weights.nbytes, evicting) for kept in retentions]
    return Estimate(tuple(rows), policy, weights.note, where, memory_bytes(where))
