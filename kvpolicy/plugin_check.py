"""What a class must be to fill a role, and how an object is made from the parameters of a plan or a command line."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import types
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from kvpolicy.errors import KVPolicyError, PluginError
from kvpolicy.hookspecs import Role
from kvpolicy.interfaces import SOURCES, BudgetAllocator, EvictionPolicy, ImportanceEstimator, SplitScope

BASES: dict[Role, type] = {
    "estimator": ImportanceEstimator,
    "allocator": BudgetAllocator,
    "policy": EvictionPolicy,
}
"""The base class of each role."""


def class_problems(role: Role, target: object) -> list[str]:
    """Everything that keeps `target` from filling `role`; empty when it can."""
    if not isinstance(target, type):
        return [f"it is a {type(target).__name__}, not a class"]
    if not issubclass(target, BASES[role]):
        return [*_wrong_base(role, target), *_dataclass_problems(target)]
    problems = [*_abstract_problems(target), *_dataclass_problems(target), *_contract_problems(role, target)]
    return problems or _default_problems(role, target)


def _wrong_base(role: Role, target: type) -> list[str]:
    own = [other for other, base in BASES.items() if issubclass(target, base)]
    hint = f" (it is a kvpolicy.{BASES[own[0]].__name__}: register it with register.{own[0]})" if own else ""
    return [f"it is no subclass of kvpolicy.{BASES[role].__name__}{hint}"]


def _abstract_problems(target: type) -> list[str]:
    missing = sorted(getattr(target, "__abstractmethods__", ()))
    return [f"it does not implement {', '.join(missing)}"] if missing else []


def _dataclass_problems(target: type) -> list[str]:
    settings = vars(target).get("__dataclass_params__")
    if settings is None:
        return ["it is not a dataclass: decorate it with @dataclass(frozen=True, slots=True)"]
    problems = [] if settings.frozen else ["it is not frozen: decorate it with @dataclass(frozen=True, slots=True)"]
    for field in dataclasses.fields(target):
        problems += _field_problems(field)
    return problems


def _field_problems(field: dataclasses.Field[Any]) -> list[str]:
    if not field.init:
        return [f"field '{field.name}' has init=False, but a plugin object holds hyper-parameters only"]
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return [f"field '{field.name}' has no default"]
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if not is_json(default):
        return [f"the default of field '{field.name}' is {default!r}, which JSON cannot hold"]
    return []


def _contract_problems(role: Role, target: type) -> list[str]:
    problems = []
    requires: object = getattr(target, "requires", frozenset())
    if not isinstance(requires, frozenset):
        problems.append(f"`requires` is a {type(requires).__name__}, expected a frozenset of source names")
    elif unknown := sorted(map(str, requires - SOURCES)):
        problems.append(f"`requires` lists {quoted(unknown)}; the sources are {quoted(sorted(SOURCES))}")
    if role == "allocator":
        problems += _split_problems(target)
    return problems


def _split_problems(target: type) -> list[str]:
    scope = getattr(target, "split_scope", None)
    if scope not in get_args(SplitScope):
        return [f"`split_scope` is {scope!r}, expected one of {quoted(get_args(SplitScope))}"]
    if scope != "none" and getattr(target, "split", None) is BudgetAllocator.split:
        return [f"`split_scope` is '{scope}' but `split` is not implemented"]
    return []


def _default_problems(role: Role, target: type) -> list[str]:
    try:
        instance = target()
    except Exception as error:
        return [f"{target.__name__}() with its defaults raises {describe(error)}"]
    sinks = getattr(instance, "num_sink_tokens", None)
    if role == "policy" and (not isinstance(sinks, int) or isinstance(sinks, bool) or sinks < 0):
        return [f"`num_sink_tokens` is {sinks!r}, expected an int >= 0, for example a field `num_sink_tokens: int = 4`"]
    return []


def build(cls: type, params: Mapping[str, Any], owner: str) -> Any:
    """An instance of a checked plugin class; `owner` says in messages who it is ("policy 'x' of dist 1.0").

    A list becomes a tuple where the default is one, since JSON has no tuples.
    Raises `PluginError` for a parameter that is unknown, of the wrong type, or that the class refuses.
    """
    defaults = dataclasses.asdict(cls())
    problems = [_unknown(name, defaults) for name in params if name not in defaults]
    hints = _hints(cls)
    values = {}
    for name, value in params.items():
        values[name] = tuple(value) if isinstance(value, list) and isinstance(defaults.get(name), tuple) else value
        if name in defaults and not (is_json(value) and _accepts(hints.get(name, Any), values[name])):
            problems.append(f"'{name}' is {value!r}, expected {inspect.formatannotation(hints.get(name, 'JSON'))}")
    if not problems:
        try:
            return cls(**values)
        except Exception as error:
            problems.append(f"{cls.__name__} refuses {dict(params)}: {describe(error)}")
    listed = ", ".join(f"{name} = {default!r}" for name, default in defaults.items())
    raise PluginError(f"{owner}: {'; '.join(problems)}. Its parameters: {listed or 'none'}")


def _unknown(name: str, known: Iterable[str]) -> str:
    return f"there is no parameter '{name}'{did_you_mean(name, known)}"


def _hints(cls: type) -> dict[str, Any]:
    try:
        return get_type_hints(cls)
    except Exception:  # an annotation that only type checkers can see: then the class itself must judge
        return {}


def _accepts(hint: Any, value: object) -> bool:
    """Whether a value fits a plain annotation; one that is not plain accepts everything."""
    if get_origin(hint) in (Union, types.UnionType):
        return any(_accepts(part, value) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint) if hint in (bool, str, type(None)) else True


def is_json(value: object) -> bool:
    """Whether JSON can hold the value (NaN and infinity it cannot)."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def describe(error: BaseException) -> str:
    """One line: the type of an exception and its message; of our own errors the message alone."""
    message = " ".join(str(error).split())
    if isinstance(error, KVPolicyError):
        return message
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def quoted(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'a', 'b'?)`, or nothing when no known name is close."""
    close = difflib.get_close_matches(name, list(known), n=3)
    return f" (did you mean {quoted(close)}?)" if close else ""
