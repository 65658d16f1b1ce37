"""What the three checks share: stating a law, and the laws that hold for every role."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kvpolicy.errors import KVPolicyError
from kvpolicy.plugins.activations import Sources
from kvpolicy.plugins.checks import build, class_problems, instance_problems
from kvpolicy.plugins.faults import describe
from kvpolicy.plugins.hookspecs import Role

_T = TypeVar("_T")


class LawError(AssertionError):
    """A plugin breaks a law of its role."""


def hold(ok: bool, plugin: object, law: str, case: str, got: object, advice: str) -> None:
    """Raises `LawError` unless `ok`.

    law: what must hold;  case: the input;  got: what came back;  advice: what the author can do
    """
    if not ok:
        raise LawError(
            f"{name_of(plugin)} breaks a law: {law}\n  given: {case}\n  got:   {shown(got)}\n  to do: {advice}"
        )


def name_of(plugin: object) -> str:
    return plugin.__name__ if isinstance(plugin, type) else repr(plugin)


def shown(value: object) -> str:
    """A tensor as its shape, type and first values; anything else as text."""
    if not isinstance(value, Tensor):
        return str(value)
    flat = value.detach().flatten()
    values = ", ".join(f"{float(x):.4g}" for x in flat[:6])
    return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')} [{values}{', ...' * (len(flat) > 6)}]"


def instance_of(role: Role, plugin: Any) -> Any:
    """The instance to check, made with the defaults if a class is given."""
    cls = plugin if isinstance(plugin, type) else type(plugin)
    if problems := class_problems(role, cls):
        raise LawError(f"{cls.__name__} cannot be registered as {role}:\n  - " + "\n  - ".join(problems))
    instance = cls() if isinstance(plugin, type) else plugin
    if problems := instance_problems(role, instance):
        raise LawError(f"{name_of(instance)} says of itself what cannot be:\n  - " + "\n  - ".join(problems))
    params = instance.params()
    try:
        again = build(role, cls, json.loads(json.dumps(params, allow_nan=False)), cls.__name__).params()
    except Exception as error:
        again = describe(error)
    advice = "keep fields to numbers, strings, booleans, None, and lists or tuples of them; __post_init__ only checks"
    hold(again == params, instance, "params() survive a plan file (JSON)", f"params {params}", again, advice)
    return instance


def call(plugin: object, what: str, case: str, function: Callable[..., _T], *args: object) -> _T:
    """The result of `function(*args)`; an exception of the plugin becomes a `LawError`."""
    try:
        return function(*args)
    except LawError:
        raise
    except Exception as error:
        requires = sorted(getattr(plugin, "requires", ()))
        verb = "refuses:" if isinstance(error, KVPolicyError) else "raised"
        raise LawError(
            f"{name_of(plugin)}: {what} {verb} {describe(error)}\n  given: {case}\n"
            f"  to do: see the traceback above; `requires` is {requires}, and no other field can be read"
        ) from error


def tensors_of(record: object) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a dataclass such as `LayerActivations` or `Importance`, by name: "keys", "rope.0", "module.w"."""
    if isinstance(record, Sources):
        values = record.supplied()
    else:
        values = {field.name: getattr(record, field.name) for field in fields(record)}  # type: ignore[arg-type]
    for name, value in values.items():
        yield from _named_tensors(name, value)


def _named_tensors(name: str, value: object) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, tuple):
        for index, part in enumerate(value):
            yield from _named_tensors(f"{name}.{index}", part)
    elif isinstance(value, nn.Module):
        yield from ((f"{name}.{own}", weight) for own, weight in value.state_dict(keep_vars=True).items())
    elif is_dataclass(value):
        yield from ((f"{name}.{own}", part) for own, part in tensors_of(value))


def snapshot(record: object) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in tensors_of(record)}


def hold_unchanged(plugin: object, what: str, case: str, record: object, before: dict[str, Tensor]) -> None:
    """Holds that the tensors of an argument are what they were."""
    for name, value in tensors_of(record):
        law = f"{what} leaves its arguments unchanged, and changed `{type(record).__name__}.{name}`"
        hold(torch.equal(value, before[name]), plugin, law, case, value, "work on a copy; avoid methods ending in '_'")


def hold_tensor(plugin: object, what: str, case: str, value: object, shape: tuple[int, ...], axes: str) -> None:
    """Holds that `value` is a finite tensor of a shape."""
    hold(isinstance(value, Tensor), plugin, f"{what} is a tensor", case, type(value).__name__, "return a torch.Tensor")
    assert isinstance(value, Tensor)
    law = f"{what} has shape {axes} = {list(shape)}"
    hold(tuple(value.shape) == shape, plugin, law, case, value, "take the sizes from the arguments, not from constants")
    advice = "guard divisions, logarithms and powers of zero; use a large finite number where infinity is meant"
    hold(bool(torch.isfinite(value).all()), plugin, f"{what} is finite", case, value, advice)


def hold_float32(plugin: object, what: str, case: str, value: Tensor) -> None:
    hold(value.dtype == torch.float32, plugin, f"{what} is float32", case, value, "convert with .to(torch.float32)")


def hold_not_negative(plugin: object, what: str, case: str, value: Tensor) -> None:
    hold(bool((value >= 0).all()), plugin, f"{what} is not negative", case, value, "clamp, or shift by the minimum")


def hold_same(plugin: object, what: str, case: str, first: Tensor, second: Tensor) -> None:
    """Holds that a second call with the same arguments gave the same."""
    law = f"{what} is the same for the same arguments"
    got = f"{shown(first)}, then {shown(second)}"
    advice = "use no global random state (seed a torch.Generator from a field) and keep nothing between calls"
    hold(torch.equal(first, second), plugin, law, case, got, advice)
