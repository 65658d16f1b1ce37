"""Every question that the core puts to a plugin: the call, and the check of what came back.

Nothing else in the core calls a method of a plugin (`tests/test_architecture.py`), so that a fault in one is, wherever
it happens, one `PluginError` that names role, plugin, distribution and method.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from kvpolicy.errors import KVPolicyError
from kvpolicy.model.spec import Budget, Importance, ModelSpec
from kvpolicy.plugins.activations import LayerActivations, LayerStatistics, Rotary
from kvpolicy.plugins.checks import BASES, instance_problems, is_json
from kvpolicy.plugins.decode_step import DecodeStep
from kvpolicy.plugins.faults import PluginFault, contained, describe, is_plugins, place
from kvpolicy.plugins.registry import registry
from kvpolicy.plugins.roles import BudgetAllocator, EvictionPolicy, ImportanceEstimator, ModelProbe, Trial
from kvpolicy.plugins.task_role import Sample, Task, Turn

_Plugin = TypeVar("_Plugin", ImportanceEstimator, BudgetAllocator, EvictionPolicy, Task)
_Searched = TypeVar("_Searched", BudgetAllocator, EvictionPolicy)


def admitted(plugin: _Plugin) -> _Plugin:
    """A plugin object from outside, if what it says of itself can be. Raises `PluginError`."""
    role = next(role for role, base in BASES.items() if isinstance(plugin, base))
    with contained(registry.whose(plugin)):
        problems = instance_problems(role, plugin)
    if problems:
        raise PluginFault(f"{registry.whose(plugin)}: {'; '.join(problems)}")
    return plugin


def with_defaults(plugin: type[_Plugin]) -> _Plugin:
    """An object of a plugin's class. Raises `PluginError`."""
    with contained(f"{registry.whose(plugin)}: {plugin.__name__}() with its defaults"):
        return plugin()


def params_of(plugin: ImportanceEstimator | BudgetAllocator | EvictionPolicy | Task) -> dict[str, Any]:
    """The hyper-parameters, JSON values by name."""
    params = _ask(plugin, "params")
    if not isinstance(params, dict) or not is_json(params):
        _refuse(plugin, "params", params, "a dict of JSON values")
    return params


def lent(source: Any) -> Any:
    """A copy of a source, for a plugin alone: what it writes there changes nothing of the model's, be it the keys of a
    prompt, the residual stream or a weight. `module` alone is the model's own.
    """
    if isinstance(source, Tensor):
        return source.detach().clone()
    if isinstance(source, tuple):
        return tuple(map(lent, source))
    if isinstance(source, Rotary):
        return Rotary(lent(source.first), lent(source.second), lent(source.frequencies))
    return source


# --- estimators


def num_forwards(estimator: ImportanceEstimator, spec: ModelSpec, *, prompts: int, sequences: int) -> int:
    count = _ask(estimator, "num_forwards", spec, prompts=prompts, sequences=sequences)
    if type(count) is not int or count < 0:
        _refuse(estimator, "num_forwards", count, "an int >= 0")
    return count


def importance(estimator: ImportanceEstimator, probe: ModelProbe) -> Importance:
    """Its tensors are on the CPU."""
    result = _ask(estimator, "estimate", probe)
    expected = f"an Importance of (budgeted layers, KV heads) = {probe.spec.table_shape}"
    if not isinstance(result, Importance):
        _refuse(estimator, "estimate", result, expected)
    if not _is_real(result.per_head, probe.spec.table_shape):
        _refuse(estimator, "estimate", result.per_head, expected)
    with contained(_name_of(estimator, "estimate")):
        values = {field.name: getattr(result, field.name) for field in dataclasses.fields(Importance)}
        there: dict[str, Any] = {name: x.detach().cpu() for name, x in values.items() if isinstance(x, Tensor)}
        if result.format_curves is not None:
            there["format_curves"] = {name: x.detach().cpu() for name, x in result.format_curves.items()}
        return dataclasses.replace(result, **there)


def token_maps(estimator: ImportanceEstimator, probe: ModelProbe) -> list[Tensor]:
    """float32 `[L, num_q_heads, n]` of each prompt."""
    maps, count = _ask(estimator, "token_maps", probe), len(probe.prompts)
    if not isinstance(maps, list) or len(maps) != count:
        _refuse(estimator, "token_maps", maps, f"a list of {count} tensors")
    for prompt, values in zip(probe.prompts, maps, strict=True):
        shape = (probe.spec.num_budgeted_layers, probe.spec.num_q_heads, len(prompt))
        if not _is_real(values, shape) or not bool(torch.isfinite(values).all()):
            _refuse(estimator, "token_maps", values, f"finite numbers of shape {shape}")
    return [values.detach().cpu() for values in maps]


# --- what is searched


def suggested(plugin: type[_Searched], trial: Trial) -> _Searched:
    """What the class makes of a trial's answers: an object of its own."""
    made = _ask(plugin, "suggest", trial)
    if not isinstance(made, plugin):
        _refuse(plugin, "suggest", made, f"a {plugin.__name__}")
    return admitted(made)


# --- allocators


def shares(allocator: BudgetAllocator, measured: Importance, budget: Budget) -> Tensor:
    """`[L, H]` on the CPU, finite, >= 0, not all zero. The allocator gets copies: what it writes to is its own."""
    result = _ask(allocator, "shares", copy.deepcopy(measured), copy.deepcopy(budget))
    return checked_shares(allocator, "shares", result, budget.shape)


def learned_shares(
    allocator: BudgetAllocator, probe: ModelProbe, measured: Importance, budget: Budget
) -> Tensor | None:
    """As `shares`; None where the allocator does not learn."""
    result = _ask(allocator, "fit", probe, copy.deepcopy(measured), copy.deepcopy(budget))
    return None if result is None else checked_shares(allocator, "fit", result, budget.shape)


def split_shares(
    allocator: BudgetAllocator, scores: Sequence[Tensor], budget: Budget, statistics: Sequence[LayerStatistics] = ()
) -> Tensor:
    """`[B, l + 1, H]` on the CPU, finite, >= 0. `scores` are the allocator's: nobody else needs them.

    statistics: of as many layers; an allocator that requires none is not given them
    """
    shape, note = (len(scores[0]), *budget.shape), "; scores are inf for entries that stay and -inf for absent ones"
    required = copy.deepcopy(statistics) if allocator.requires else ()
    result = _ask(allocator, "split", scores, _copy(budget), *required)
    return _proportions(allocator, "split", result, shape, note)


def _copy(budget: Budget) -> Budget:
    """With tensors of its own: once a layer, where a deep copy takes several times as long."""
    own: dict[str, Any] = {field.name: getattr(budget, field.name) for field in dataclasses.fields(Budget)}
    own = {name: x.clone() if isinstance(x, Tensor) else x for name, x in own.items()}
    return Budget(**own)


def checked_shares(allocator: BudgetAllocator, method: str, result: object, shape: tuple[int, ...]) -> Tensor:
    """Shares for a plan, as the allocator gave them now, or gave them once. On the CPU."""
    proportions = _proportions(allocator, method, result, shape)
    if not bool((proportions > 0).any()):
        _refuse(allocator, method, proportions, "a share above 0 for at least one KV head", "all of it 0")
    return proportions


def _proportions(
    allocator: BudgetAllocator, method: str, result: object, shape: tuple[int, ...], note: str = ""
) -> Tensor:
    if not isinstance(result, Tensor) or not _is_real(result, shape):
        _refuse(allocator, method, result, f"numbers of shape {shape}")
    numbers = result.detach().cpu()
    bad = ~((numbers >= 0) & (numbers < torch.inf))  # of NaN neither holds
    if bool(bad.any()):
        at = bad.nonzero()[0].tolist()
        description = f"{float(numbers[tuple(at)])} at {at}"
        _refuse(allocator, method, result, f"shares that are finite and >= 0{note}", description)
    return numbers


# --- policies


def prompt_scores(
    policy: EvictionPolicy, activations: LayerActivations, shape: tuple[int, ...], device: torch.device
) -> Tensor:
    """float32 `[B, H, n]`. Whether there is NaN among them is not asked here: that waits for the device."""
    return _scores(policy, "score_prompt", _ask(policy, "score_prompt", activations), shape, device)


def step_scores(policy: EvictionPolicy, step: DecodeStep) -> Tensor:
    """float32 [R], one for each row. Called for each layer and token: costs the host a microsecond or two."""
    scores = _ask(policy, "score_step", step)
    return _scores(policy, "score_step", scores, step.scores.shape, step.scores.device)


def refuse_nan(policy: EvictionPolicy, method: str, layers: Sequence[int]) -> NoReturn:
    """For scores that were found to hold NaN. layers: where, among the budgeted ones"""
    others = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
    where = f"layer {layers[0]}{others}"
    _refuse(policy, method, None, "numbers", f"NaN in {where}: absent entries (position -1) must be masked out")


def _scores(
    policy: EvictionPolicy, method: str, scores: object, shape: tuple[int, ...], device: torch.device
) -> Tensor:
    if (
        isinstance(scores, Tensor)
        and scores.dtype is torch.float32
        and scores.layout is torch.strided
        and not scores.is_nested
        and scores.shape == shape
        and scores.device == device
    ):
        return scores.detach() if scores.requires_grad else scores
    description = None
    if isinstance(scores, Tensor) and _is_plain(scores) and scores.device != device:
        description = f"scores on {scores.device}"
    where = "" if description is None else f" on {device}, where what it was given lies"
    _refuse(policy, method, scores, f"float32 of shape {tuple(shape)}{where}", description)


# --- tasks


def task_samples(task: Task, tokenizer: Any, count: int, length: int, seed: int) -> list[Sample]:
    """At most `count` and one at least, none of them longer than `length`."""
    samples = _ask(task, "samples", tokenizer, count, length, seed)
    expected = f"1 to {count} samples of at most {length} tokens, with a question for every turn"
    if not isinstance(samples, Sequence) or not 1 <= len(samples) <= count:
        description = f"{len(samples)} samples" if isinstance(samples, Sequence) else None
        _refuse(task, "samples", samples, expected, description)
    for index, sample in enumerate(samples):
        if not isinstance(sample, Sample) or not sample.turns or len(sample.turns) != len(sample.questions):
            _refuse(task, "samples", sample, expected, f"{sample!r:.60} as number {index}")
        if not sample.context or not all(sample.questions) or sample.length > length:
            _refuse(
                task, "samples", sample, expected, f"one of {sample.length} tokens as number {index}, or an empty part"
            )
    return list(samples)


def answer_score(task: Task, answer: str, turn: Turn) -> float:
    score = _ask(task, "score", answer, turn)
    if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
        _refuse(task, "score", score, "a number from 0 to 1", repr(score)[:60])
    return float(score)


# --- the door


def _ask(plugin: object, method: str, *args: Any, **kwargs: Any) -> Any:
    """What a method of a plugin object, or of its class, returns. Raises `PluginError` for whatever it throws."""
    try:
        return getattr(plugin, method)(*args, **kwargs)
    except BaseException as error:
        if not is_plugins(error):
            raise
        verb, where = ("refuses:", "") if isinstance(error, KVPolicyError) else ("raised", place(error))
        raise PluginFault(f"{_name_of(plugin, method)} {verb} {describe(error)}{where}") from error


def _name_of(plugin: object, method: str) -> str:
    cls = plugin if isinstance(plugin, type) else type(plugin)
    return f"{registry.whose(cls)}: {cls.__name__}.{method}"


def _refuse(plugin: object, method: str, came: object, expected: str, description: str | None = None) -> NoReturn:
    """description: what came, where it is not told by its type"""
    description = _described(came) if description is None else description
    raise PluginFault(f"{_name_of(plugin, method)} returned {description}, expected {expected}")


def _described(value: object) -> str:
    if not isinstance(value, Tensor):
        return "None" if value is None else f"a {type(value).__name__}"
    if value.is_nested:
        return "a nested tensor"
    kind = f"{value.dtype} of shape {tuple(value.shape)}"
    layout = "" if value.layout is torch.strided else f", {value.layout}"
    return kind + layout + (" without values (meta)" if value.is_meta else "")


def _is_plain(value: Tensor) -> bool:
    """Whether the tensor holds its numbers, one for each index."""
    return value.layout is torch.strided and not value.is_nested and not value.is_meta


def _is_real(value: object, shape: tuple[int, ...]) -> bool:
    """Whether it is a tensor of this shape that holds real numbers."""
    if not isinstance(value, Tensor) or not _is_plain(value) or value.is_quantized:
        return False
    return tuple(value.shape) == shape and not value.is_complex() and value.dtype is not torch.bool
