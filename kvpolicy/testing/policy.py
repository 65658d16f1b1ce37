"""The laws of an eviction policy."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kvpolicy.plugins.activations import LayerActivations
from kvpolicy.plugins.decode_step import DecodeStep
from kvpolicy.plugins.roles import EvictionPolicy
from kvpolicy.testing.later_chunk import BATCH, LaterChunk, first_prompt, in_slots
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

_SHORT, _LONG = LaterChunk(24, 8), LaterChunk(600, 300)
_SEGMENTS = (0, 1, 7, 12)  # entries of each (sequence, KV head) in a decoding step
_ROUNDING = 1e-5  # of the larger score of a pair
_FEW = 1000  # one pair in so many may flip: a threshold, crossed by rounding


def check_eviction_policy(policy: EvictionPolicy | type[EvictionPolicy]) -> None:
    """Checks the laws of `EvictionPolicy`: scores of prompts, later chunks and a step, absent entries, slots, recency.

    Raises `LawError`, an `AssertionError`.
    """
    instance: EvictionPolicy = instance_of("policy", policy)
    for layer in (0, 2):
        given = f"a first prompt of {_SHORT.length} tokens, layer {layer}"
        _check_prompt(instance, given, first_prompt(instance, layer, _SHORT.length), _SHORT.length)
        _check_prompt(instance, f"{_SHORT}, layer {layer}", _SHORT.given(instance, layer), _SHORT.length)
    if "positions" in instance.requires:
        _check_absent(instance)
    if instance.window_rule:
        _check_window_rule(instance)
    _check_prompt(
        instance, f"a first prompt of {_LONG.length} tokens", first_prompt(instance, 1, _LONG.length), _LONG.length
    )
    _check_slots(instance, _LONG)
    _check_step(instance)


def _check_prompt(policy: EvictionPolicy, given: str, activations: LayerActivations, length: int) -> Tensor:
    """Returns the scores."""
    before = snapshot(activations)
    scores = call(policy, "score_prompt", given, policy.score_prompt, activations)
    hold_unchanged(policy, "score_prompt", given, activations, before)
    shape = (BATCH, SyntheticProbe().spec.num_kv_heads, length)
    hold_tensor(policy, "score_prompt", given, scores, shape, "[B, H, n]")
    hold_float32(policy, "score_prompt", given, scores)
    hold_same(policy, "score_prompt", given, scores, policy.score_prompt(activations))
    return scores


def _check_slots(policy: EvictionPolicy, later: LaterChunk) -> None:
    activations, slots = later.given(policy, 1), later.other_slots
    scores = _check_prompt(policy, str(later), activations, later.length).gather(2, slots)
    moved, present = policy.score_prompt(in_slots(activations, slots)), later.positions.gather(2, slots) >= 0
    flips = sum(_flipped(one[here], two[here]) for one, two, here in _heads(scores, moved, present))
    pairs = sum(int(here.sum()) ** 2 // 2 for (here,) in _heads(present))
    law = "the order of scores does not depend on the slots that the entries lie in"
    got = f"{flips} of {pairs} pairs of entries change order when the kept ones change places"
    advice = "slots are reused, so the order of entries is not their age: require `positions`, and sort by them"
    hold(flips <= pairs // _FEW, policy, law, str(later), got, advice)


def _heads(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The rows of `[B, H, n]`, one KV head of one sequence after the other."""
    return zip(*(tensor.flatten(0, 1) for tensor in tensors), strict=True)


def _check_absent(policy: EvictionPolicy) -> None:
    zero, garbage = (policy.score_prompt(_SHORT.given(policy, 1, garbage=value)) for value in (0.0, 50.0))
    for one, two, present in zip(zero[:, 0], garbage[:, 0], _SHORT.positions[:, 0] >= 0, strict=True):
        flips = _flipped(one[present], two[present])
        law = "absent entries (position -1) do not change the order of the others"
        got = f"{flips} pairs of present entries change order when absent keys and values go from 0 to 50"
        advice = "mask entries with positions < 0 out of means, sums, pooling and normalisation"
        hold(flips == 0, policy, law, str(_SHORT), got, advice)


def _flipped(first: Tensor, second: Tensor) -> int:
    """Pairs that one tensor orders one way and the other the other way, beyond rounding."""
    one, two = first[:, None] - first, second[:, None] - second
    slack = _ROUNDING * torch.maximum(first[:, None].abs(), first.abs())
    return int(((one > slack) & (two < -slack)).sum())


def _check_window_rule(policy: EvictionPolicy) -> None:
    law = "a policy with window_rule = True keeps the most recent entries"
    advice = "score by `positions` (slots are reused, so the order of entries is not their age), or drop window_rule"
    hold("positions" in policy.requires, policy, law, "`requires`", sorted(policy.requires), advice)
    for row_positions, row_scores in _heads(_SHORT.positions, policy.score_prompt(_SHORT.given(policy, 1))):
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
