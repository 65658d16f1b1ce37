"""The laws of an eviction policy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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
from kvpolicy.testing.suggestions import suggested
from kvpolicy.testing.synthetic import SyntheticProbe

_SHORT, _LONG = LaterChunk(24, 8), LaterChunk(600, 300)
_SEGMENTS = (0, 1, 7, 12)  # entries of each (sequence, KV head) in a decoding step
_ROWS = (2, 1, 9, 16)  # rows of each, the free ones behind the entries
_ROUNDING = 1e-5  # of the larger score of a pair
_FEW = 1000  # one pair in so many may flip: a threshold, crossed by rounding


def check_eviction_policy(policy: EvictionPolicy | type[EvictionPolicy]) -> None:
    """Checks the laws of `EvictionPolicy`: scores of prompts, later chunks and a step, absent entries, slots, recency.

    Of a step also that free rows change nothing, and that no number is asked of the device. All of it holds for the
    given instance and for what `suggest` makes of the lowest, highest and default values, where there is one.
    Raises `LawError`, an `AssertionError`.
    """
    instance: EvictionPolicy = instance_of("policy", policy)
    _check_scores(instance)
    suggest, inherited = (getattr(cls.suggest, "__func__", None) for cls in (type(instance), EvictionPolicy))
    if suggest is inherited:
        return
    for candidate in suggested(type(instance)):
        law = "`window_rule` is the same whatever `suggest` makes"
        advice = "their losses could not be compared; make two policies of it"
        is_same = candidate.window_rule == instance.window_rule
        hold(is_same, candidate, law, f"`window_rule` = {instance.window_rule}", candidate.window_rule, advice)
        _check_scores(instance_of("policy", candidate))


def _check_scores(instance: EvictionPolicy) -> None:
    for layer in (0, 2):
        case = f"a first prompt of {_SHORT.length} tokens, layer {layer}"
        _check_prompt(instance, case, first_prompt(instance, layer, _SHORT.length), _SHORT.length)
        _check_prompt(instance, f"{_SHORT}, layer {layer}", _SHORT.activations(instance, layer), _SHORT.length)
    if "positions" in instance.requires:
        _check_absent(instance)
    if instance.window_rule:
        _check_window_rule(instance)
    _check_prompt(
        instance, f"a first prompt of {_LONG.length} tokens", first_prompt(instance, 1, _LONG.length), _LONG.length
    )
    _check_slots(instance, _LONG)
    if instance.rescores:
        _check_step(instance)


def _check_prompt(policy: EvictionPolicy, case: str, activations: LayerActivations, length: int) -> Tensor:
    """Returns the scores."""
    before = snapshot(activations)
    scores = call(policy, "score_prompt", case, policy.score_prompt, activations)
    hold_unchanged(policy, "score_prompt", case, activations, before)
    shape = (BATCH, SyntheticProbe().spec.num_kv_heads, length)
    hold_tensor(policy, "score_prompt", case, scores, shape, "[B, H, n]")
    hold_float32(policy, "score_prompt", case, scores)
    hold_same(policy, "score_prompt", case, scores, policy.score_prompt(activations))
    return scores


def _check_slots(policy: EvictionPolicy, later: LaterChunk) -> None:
    activations, slots = later.activations(policy, 1), later.other_slots
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
    zero, garbage = (policy.score_prompt(_SHORT.activations(policy, 1, garbage=value)) for value in (0.0, 50.0))
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
    for row_positions, row_scores in _heads(_SHORT.positions, policy.score_prompt(_SHORT.activations(policy, 1))):
        _check_recency(policy, law, advice, row_positions, row_scores)


def _check_recency(policy: EvictionPolicy, law: str, advice: str, positions: Tensor, scores: Tensor) -> None:
    """positions, scores: `[n]` of one KV head. Sink tokens are the cache's, whatever their score."""
    free = positions >= policy.num_sink_tokens
    order = positions[free].argsort()
    rising = bool((scores[free][order].diff() > 0).all())
    hold(rising, policy, law, f"positions {positions[free][order].tolist()}", scores[free][order], advice)


def _check_step(policy: EvictionPolicy) -> None:
    step = _step(policy)
    case = f"a decoding step with {sum(_SEGMENTS)} entries in segments of {_SEGMENTS}, in {sum(_ROWS)} rows"
    before = snapshot(step)
    scores = call(policy, "score_step", case, policy.score_step, step)
    hold_unchanged(policy, "score_step", case, step, before)
    hold(isinstance(scores, Tensor), policy, "score_step is a tensor", case, type(scores).__name__, "return a Tensor")
    shape, advice = (sum(_ROWS),), "score every row; what is returned for a free one is ignored"
    hold(tuple(scores.shape) == shape, policy, f"score_step has shape [R] = {list(shape)}", case, scores, advice)
    present = step.positions >= 0
    hold_tensor(policy, "score_step", case, scores[present], (sum(_SEGMENTS),), "[entries]")
    hold_float32(policy, "score_step", case, scores)
    hold_same(policy, "score_step", case, scores[present], policy.score_step(step)[present])
    _check_free_rows(policy, case, present, scores)
    _check_host(policy, case, step)
    if policy.window_rule:
        law = "after a step too, a policy with window_rule = True keeps the most recent entries"
        advice = "leave score_step as it is, or score by step.positions"
        for segment in range(len(_SEGMENTS)):
            part = present & (step.segment == segment)
            _check_recency(policy, law, advice, step.positions[part], scores[part])


def _check_free_rows(policy: EvictionPolicy, case: str, present: Tensor, scores: Tensor) -> None:
    other = policy.score_step(_step(policy, garbage=-3e4))
    law = "free rows (position -1) do not change the scores of entries"
    advice = "sum with step.total, compare with step.largest: both leave free rows out"
    hold(torch.equal(scores[present], other[present]), policy, law, case, other[present], advice)


def _check_host(policy: EvictionPolicy, case: str, step: DecodeStep) -> None:
    with _Waits() as waits:
        policy.score_step(step)
    law = "score_step does not wait for the device: no number is read from it, no shape depends on what it holds"
    advice = "use torch.where instead of masks as indices, and step.max_positions instead of positions.max().item()"
    hold(not waits.names, policy, law, case, ", ".join(waits.names), advice)


class _Waits(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch types it not
    """The operations that would wait for the device, by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        indexes = func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.repeat_interleave)
        if indexes:  # by masks, or without the size that comes out
            by_mask = any(getattr(index, "dtype", None) is torch.bool for arg in args[1:2] for index in arg or ())
            waits = by_mask if func.overloadpacket is torch.ops.aten.index else kwargs.get("output_size") is None
        else:
            waits = bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}.intersection(func.tags))
        if waits:
            self.names.append(str(func.overloadpacket))
        return func(*args, **kwargs)


def _step(policy: EvictionPolicy, garbage: float = 0.0) -> DecodeStep:
    """garbage: what the keys and values of free rows hold."""
    generator = torch.Generator().manual_seed(1)
    spec, rows = SyntheticProbe().spec, torch.tensor(_ROWS)
    segment = torch.arange(len(_ROWS)).repeat_interleave(rows)
    column = torch.arange(len(segment)) - (rows.cumsum(0) - rows)[segment]
    present = column < torch.tensor(_SEGMENTS)[segment]
    order = torch.cat([torch.randperm(40, generator=generator)[:count] for count in _ROWS])
    positions = order.int().where(present, -1)
    random, mass = (torch.rand(len(segment), generator=generator) for _ in range(2))
    sources = {
        name: torch.randn(len(segment), spec.head_dim, generator=generator).where(present[:, None], garbage)
        for name in ("keys", "values")
    }
    sources["attention"] = mass.where(present, 0.0)
    required = {"attention": "decode_attention"}
    scores = positions.to(torch.float32) if policy.window_rule else random
    return DecodeStep(
        layer=1,
        num_kv_heads=spec.num_kv_heads,
        segment=segment,
        scores=scores.where(present, -torch.inf),
        positions=positions,
        lengths=torch.tensor(_SEGMENTS),
        seen=torch.tensor([40, 40]),
        max_positions=64,
        **{name: source for name, source in sources.items() if required.get(name, name) in policy.requires},
    )
