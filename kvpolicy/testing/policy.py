"""The laws of an eviction policy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvpolicy.plugins.activations import LayerActivations
from kvpolicy.plugins.decode_step import DecodeStep
from kvpolicy.plugins.roles import EvictionPolicy
from kvpolicy.testing.laws import (
    call,
    hold,
    hold_float32,
    hold_same,
    hold_tensor,
    hold_unchanged,
    instance_of,
    snapshot,
)
from kvpolicy.testing.synthetic import SyntheticProbe

_BATCH, _LENGTH, _CHUNK = 2, 24, 8
_SEGMENTS = (0, 1, 7, 12)  # entries of each (sequence, KV head) in a decoding step
_NUM_ABSENT, _NUM_DECODED = 5, 2
_LATER = f"{_LENGTH} entries, of them {_NUM_ABSENT} absent in one KV head, the last {_CHUNK} a new chunk"


def check_eviction_policy(policy: EvictionPolicy | type[EvictionPolicy]) -> None:
    """Checks the laws of `EvictionPolicy`: scores of a prompt, of a later chunk and of a step, absent entries, recency.

    Raises `LawError`, an `AssertionError`.
    """
    instance: EvictionPolicy = instance_of("policy", policy)
    for layer in (0, 2):
        _check_prompt(instance, f"a first prompt of {_LENGTH} tokens, layer {layer}", _prompt(instance, layer))
        later = _later_chunk(_prompt(instance, layer), instance, garbage=0)
        _check_prompt(instance, f"{_LATER}, layer {layer}", later)
    if "positions" in instance.requires:
        _check_absent(instance)
    if instance.window_rule:
        _check_window_rule(instance)
    _check_step(instance)


def _prompt(policy: EvictionPolicy, layer: int) -> LayerActivations:
    requires = policy.requires - {"decode_attention"}
    return SyntheticProbe().activations(layer, requires=requires, batch_size=_BATCH, length=_LENGTH)


def _later_chunk(prompt: LayerActivations, policy: EvictionPolicy, garbage: float) -> LayerActivations:
    """The same entries as after an eviction: in no order, with gaps between positions, some absent in KV head 0.

    policy:  whose `new_entry_score` the entries have that were decoded
    garbage: what the keys and values of absent entries hold, which is nobody's promise.
    """
    positions = _later_positions(SyntheticProbe().spec.num_kv_heads)
    absent = positions < 0
    changed: dict[str, Any] = {}
    for name, given in prompt.supplied().items():
        if name == "positions":
            changed[name] = positions
        elif name == "scores":
            changed[name] = _held_scores(positions, policy.new_entry_score)
        elif name in ("window_attention", "full_attention", "repeat_attention"):
            changed[name] = given.masked_fill(absent, 0.0)
        elif name == "query_attention":
            changed[name] = given.masked_fill(absent[:, :, None], 0.0)
        elif name in ("keys", "values"):
            changed[name] = given.masked_fill(absent[..., None], garbage)
    return prompt.replace(**changed)


def _later_positions(num_kv_heads: int) -> Tensor:
    """int64 `[B, H, n]`: kept entries in no order (slots are reused) at positions below 48, then a chunk from 48 on."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randperm(48, generator=generator)[: _LENGTH - _CHUNK] for _ in range(_BATCH * num_kv_heads)]
    chunk = torch.arange(48, 48 + _CHUNK)
    positions = torch.stack([torch.cat([row, chunk]) for row in rows]).reshape(_BATCH, num_kv_heads, _LENGTH)
    positions[:, 0, 2 : 2 + _NUM_ABSENT] = -1
    return positions


def _held_scores(positions: Tensor, new_entry_score: float) -> Tensor:
    """float32 `[B, H, n]`: those of scored entries, then of decoded ones, 0 for the chunk and for absent entries."""
    scores = torch.rand(positions.shape, generator=torch.Generator().manual_seed(2))
    scores[:, :, -_CHUNK - _NUM_DECODED : -_CHUNK] = new_entry_score
    scores[:, :, -_CHUNK:] = 0.0
    return scores.masked_fill(positions < 0, 0.0)


def _check_prompt(policy: EvictionPolicy, given: str, activations: LayerActivations) -> None:
    before = snapshot(activations)
    scores = call(policy, "score_prompt", given, policy.score_prompt, activations)
    hold_unchanged(policy, "score_prompt", given, activations, before)
    shape = (_BATCH, SyntheticProbe().spec.num_kv_heads, _LENGTH)
    hold_tensor(policy, "score_prompt", given, scores, shape, "[B, H, n]")
    hold_float32(policy, "score_prompt", given, scores)
    hold_same(policy, "score_prompt", given, scores, policy.score_prompt(activations))


def _check_absent(policy: EvictionPolicy) -> None:
    positions = _later_positions(SyntheticProbe().spec.num_kv_heads)
    zero, garbage = (
        policy.score_prompt(_later_chunk(_prompt(policy, 1), policy, garbage=value)) for value in (0.0, 50.0)
    )
    for row in range(_BATCH):
        present = positions[row, 0] >= 0
        flips = _flipped(zero[row, 0][present], garbage[row, 0][present])
        law = "absent entries (position -1) do not change the order of the others"
        got = f"{flips} pairs of present entries change order when absent keys and values go from 0 to 50"
        advice = "mask entries with positions < 0 out of means, sums, pooling and normalisation"
        hold(flips == 0, policy, law, _LATER, got, advice)


def _flipped(first: Tensor, second: Tensor) -> int:
    """Pairs that one tensor orders one way and the other the other way, beyond rounding."""
    one, two = first[:, None] - first, second[:, None] - second
    slack = 1e-5 * max(float(one.abs().max()), float(two.abs().max()))
    return int(((one > slack) & (two < -slack)).sum())


def _check_window_rule(policy: EvictionPolicy) -> None:
    law = "a policy with window_rule = True keeps the most recent entries"
    advice = "score by `positions` (slots are reused, so the order of entries is not their age), or drop window_rule"
    hold("positions" in policy.requires, policy, law, "`requires`", sorted(policy.requires), advice)
    positions = _later_positions(SyntheticProbe().spec.num_kv_heads).flatten(0, 1)
    scores = policy.score_prompt(_later_chunk(_prompt(policy, 1), policy, garbage=0.0)).flatten(0, 1)
    for row_positions, row_scores in zip(positions, scores, strict=True):
        _check_recency(policy, law, advice, row_positions, row_scores)


def _check_recency(policy: EvictionPolicy, law: str, advice: str, positions: Tensor, scores: Tensor) -> None:
    """positions, scores: `[n]` of one KV head. Sink tokens are the cache's, whatever their score."""
    free = positions >= policy.num_sink_tokens
    order = positions[free].argsort()
    rising = bool((scores[free][order].diff() > 0).all())
    hold(rising, policy, law, f"positions {positions[free][order].tolist()}", scores[free][order], advice)


def _check_step(policy: EvictionPolicy) -> None:
    step = _step(policy)
    given = f"a decoding step with {sum(_SEGMENTS)} entries in segments of {_SEGMENTS}"
    before = snapshot(step)
    scores = call(policy, "score_step", given, policy.score_step, step)
    hold_unchanged(policy, "score_step", given, step, before)
    hold_tensor(policy, "score_step", given, scores, (sum(_SEGMENTS),), "[num_entries]")
    hold_float32(policy, "score_step", given, scores)
    hold_same(policy, "score_step", given, scores, policy.score_step(step))
    if policy.window_rule:
        law = "after a step too, a policy with window_rule = True keeps the most recent entries"
        advice = "leave score_step as it is, or score by step.positions"
        for segment in range(len(_SEGMENTS)):
            part = slice(int(step.indptr[segment]), int(step.indptr[segment + 1]))
            _check_recency(policy, law, advice, step.positions[part], scores[part])


def _step(policy: EvictionPolicy) -> DecodeStep:
    generator = torch.Generator().manual_seed(1)
    total, spec = sum(_SEGMENTS), SyntheticProbe().spec
    positions = torch.cat([torch.randperm(40, generator=generator)[:length] for length in _SEGMENTS])
    random = torch.rand(total, generator=generator)
    sources = {
        "keys": torch.randn(total, spec.head_dim, generator=generator),
        "attention": torch.rand(total, generator=generator),
    }
    required = {"attention": "decode_attention"}
    return DecodeStep(
        layer=1,
        num_kv_heads=spec.num_kv_heads,
        scores=positions.to(torch.float32) if policy.window_rule else random,
        positions=positions,
        indptr=torch.tensor([0, *_SEGMENTS]).cumsum(0).to(torch.int32),
        **{name: given for name, given in sources.items() if required.get(name, name) in policy.requires},
    )
