"""Calling an eviction policy: what it is given, and what is checked of its answer."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from kvpolicy_kernels.rescore import rescore
from torch import Tensor

from kvpolicy.cache.arena import LayerArena
from kvpolicy.cache.chunk import Chunk
from kvpolicy.cache.late_copy import LateCopy, waits
from kvpolicy.cache.layer import StoreLayer
from kvpolicy.cache.prompt_sources import Candidates
from kvpolicy.errors import PluginError
from kvpolicy.plugins import plugin_call
from kvpolicy.plugins.activations import LayerActivations, deferred
from kvpolicy.plugins.decode_step import DecodeStep
from kvpolicy.plugins.roles import BudgetAllocator, EvictionPolicy
from kvpolicy.plugins.source_table import OUTLIVE_PROMPT, listed, supplied_by

STORE_SOURCES = supplied_by("store", "step")
"""What a store can hand to a policy by itself."""


@dataclass(frozen=True, slots=True)
class Scoring:
    """How a layer turns scores into attention: what the op needs besides queries, keys and values."""

    scale: float | None = None
    softcap: float | None = None
    sink_logits: Tensor | None = None

    def options(self) -> dict[str, Any]:
        return {"scale": self.scale, "softcap": self.softcap, "sink_logits": self.sink_logits}


def check_sources(policy: EvictionPolicy, supplied: frozenset[str], allocator: BudgetAllocator | None) -> None:
    """Raises `PluginError` where a policy requires what it cannot be given.

    supplied:  sources besides `STORE_SOURCES`
    allocator: one that splits the budget at run time, if there is one
    """
    name, missing = type(policy).__name__, plugin_call.admitted(policy).requires - STORE_SOURCES - supplied
    if missing:
        raise PluginError(
            f"the policy {name} requires {listed(missing)}, which this cache cannot "
            f"supply; it supplies {listed(STORE_SOURCES | supplied)}"
        )
    gone = policy.requires - OUTLIVE_PROMPT - {"repeat_attention"}
    if "repeat_attention" in policy.requires and gone:
        raise PluginError(
            f"the policy {name} requires repeat_attention and {listed(gone)}: once the context has been "
            f"repeated, only {listed(OUTLIVE_PROMPT)} are left of its own forward"
        )
    if allocator is not None and allocator.requires and "repeat_attention" in policy.requires:
        raise PluginError(
            f"{type(allocator).__name__} requires {listed(allocator.requires)}, and behind the repeated context of "
            f"{name} the attention of the prompt is gone: take another policy, or an allocator that requires none"
        )
    if allocator is not None and "capacity" in policy.requires:
        raise PluginError(
            f"the policy {name} requires capacity, and {type(allocator).__name__} splits the budget at run time, by "
            "scores, so that no capacity is known before them: take an allocator with fixed shares"
        )


def scores_stay(policy: EvictionPolicy) -> bool:
    """Whether scores stay what the prompt made them, and decoded tokens outlive its entries, the oldest leaving first.

    Then it is known behind a prompt in which order entries will leave: see `eviction_order`.
    """
    return not policy.rescores and policy.new_entry_score == math.inf


def score_chunk(
    policy: EvictionPolicy,
    layer: StoreLayer,
    query: Tensor,
    chunk: Chunk,
    options: Mapping[str, Any],
    extra: Mapping[str, Any],
) -> Tensor:
    """The policy's scores of [entries held ; chunk], float32 [S, width + n].

    layer:   its table is that of the tokens seen with this chunk
    query:   [B, num_q_heads, n, D] of the chunk's last n tokens
    options: scale, softcap, sink_logits;  extra: what the policy requires besides `STORE_SOURCES`

    Raises `PluginError` for a source that is missing in `extra`, and for scores of another shape.
    """
    missing = policy.requires - STORE_SOURCES - extra.keys()
    if missing == {"repeat_attention"} and layer.arena.width:
        return _unasked(policy, layer.arena, chunk)
    if missing:
        raise PluginError(f"{type(policy).__name__} requires {listed(missing)}: give it as extra= with the prompt")
    candidates = Candidates(policy, layer, query, chunk, {**options, "power": policy.attention_power})
    outside = {name: plugin_call.lent(extra[name]) for name in policy.requires & extra.keys()}
    activations = LayerActivations(layer=layer.index, **outside | candidates.supplied())
    scores = plugin_call.prompt_scores(policy, activations, candidates.shape, layer.arena.device)
    return scores.flatten(0, 1).contiguous()  # a policy's may lie in any way


def score_step(
    policy: EvictionPolicy,
    layer: StoreLayer,
    query: Tensor,
    options: Mapping[str, Any],
    wrong: NotANumber,
) -> Tensor:
    """The attention of a decoding step, after which the policy rescores the entries. query: [B, num_q_heads, 1, D].

    wrong: is given the scores, to be checked once for all layers

    Returns [B, num_q_heads, 1, Dv]. Raises `PluginError` for scores of another type, shape or device.
    """
    arena, mass = layer.arena, None
    if arena.scores is None:  # nothing is ever evicted
        return arena.attend(query, options)
    if "decode_attention" in policy.requires:
        out, mass = arena.attend_with_mass(query, options, policy.attention_power)
    else:
        out = arena.attend(query, options)
    step = _decode_step(policy, layer, arena.scores, mass)
    scores = plugin_call.step_scores(policy, step)
    rescore(arena.scores, scores.contiguous(), arena.positions, wrong.flag(layer.index, arena.device))
    return out


def _decode_step(policy: EvictionPolicy, layer: StoreLayer, scores: Tensor, mass: Tensor | None) -> DecodeStep:
    """Every row of the arena, the free ones too. Its tensors are the policy's own. mass: float32 [R]."""
    arena = layer.arena
    sources = {}
    if own := policy.requires & {"keys", "values"}:
        keys, values = arena.vectors
        sources = {name: plugin_call.lent(keys if name == "keys" else values) for name in own}
    if mass is not None:
        sources["attention"] = mass
    return DecodeStep(
        layer=layer.index,
        num_kv_heads=layer.num_heads,
        segment=deferred(arena.owners),
        scores=deferred(lambda: plugin_call.lent(scores)),
        positions=deferred(lambda: plugin_call.lent(arena.positions)),
        lengths=arena.lengths_on_device().clone(),
        seen=layer.seen_on_device(),
        max_positions=layer.max_positions,
        **sources,
    )


def _unasked(policy: EvictionPolicy, arena: LayerArena, chunk: Chunk) -> Tensor:
    """Scores of entries and of tokens behind a context that was repeated: theirs, and a decoded token's."""
    scores = arena.padded_scores()
    assert scores is not None  # nobody else is scored
    return torch.cat([scores, scores.new_full((len(scores), len(chunk)), policy.new_entry_score)], 1)


@dataclass(slots=True)
class NotANumber:
    """In which layers a policy has returned NaN: gathered on the device, and asked for once, since asking waits for it.

    faults: bool [num_layers], of decoded tokens since the last check, at an address that stays; None where none came
    largest: [] of each layer of a prompt since the last check, the largest of its scores, NaN where one of them is
    """

    num_layers: int
    faults: Tensor | None = None
    largest: dict[int, Tensor] = field(default_factory=dict)
    _copy: LateCopy | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        own = [*self.largest.values()] if self.faults is None else [self.faults, *self.largest.values()]
        return own if self._copy is None else [*own, self._copy.value]

    def flag(self, layer: int, device: torch.device) -> Tensor:
        """What becomes True for a layer, bool []; on this device if there was none."""
        if self.faults is None:
            with torch.inference_mode(False):  # else it could not be written to outside of that mode
                self.faults = torch.zeros(self.num_layers, dtype=torch.bool, device=device)
        return self.faults[layer]

    def add(self, layer: int, scores: Tensor) -> None:
        """Scores of a prompt."""
        self.largest[layer] = scores.amax()  # in one launch

    def fork(self) -> NotANumber:
        return NotANumber(self.num_layers, None if self.faults is None else self.faults.clone(), dict(self.largest))

    def __deepcopy__(self, memo: dict[int, Any]) -> NotANumber:
        return self.fork()

    def check(self, policy: EvictionPolicy, method: str) -> None:
        """Raises `PluginError` where any of the scores since the last check was none."""
        largest, self.largest = self.largest, {}
        layers = [layer for layer, number in zip(largest, _numbers(largest.values()), strict=True) if number != number]
        if self.faults is not None and bool(self.faults.any()):
            layers += self.faults.nonzero()[:, 0].tolist()
            self.faults.zero_()
            self._copy = None
        if layers:
            plugin_call.refuse_nan(policy, method, layers)

    def look(self, policy: EvictionPolicy, method: str) -> None:
        """`check`, but a device is not waited for: what it says then is heard at a later look."""
        if self.faults is None:
            return
        copy = self._copy
        if not waits(self.faults) or (copy is not None and copy.has_arrived and bool(copy.value.any())):
            self.check(policy, method)
        elif copy is None or copy.has_arrived:
            self._copy = LateCopy(self.faults)


def _numbers(largest: Collection[Tensor]) -> list[float]:
    """[] each, on any devices. Waits for one of them."""
    if not largest:
        return []
    device = next(iter(largest)).device
    return torch.stack([each.to(device) for each in largest]).tolist()
