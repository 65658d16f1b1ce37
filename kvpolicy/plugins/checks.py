"""What a class must be to fill a role, and how an object is made from the parameters of a plan or a command line."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import math
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from kvpolicy.errors import PluginError
from kvpolicy.plugins.activations import STATISTICS
from kvpolicy.plugins.faults import contained, describe
from kvpolicy.plugins.hookspecs import Role
from kvpolicy.plugins.roles import BudgetAllocator, EvictionPolicy, ImportanceEstimator, SplitScope
from kvpolicy.plugins.source_table import SOURCES
from kvpolicy.plugins.task_role import Task

BASES: dict[Role, type] = {
    "estimator": ImportanceEstimator,
    "allocator": BudgetAllocator,
    "policy": EvictionPolicy,
    "task": Task,
}
"""The base class of each role."""


def quoted(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


Law = Callable[[str, Any], str]
"""name, value -> what is wrong with the value, or nothing."""

_MOST = 2**31 - 1  # more tokens than a cache can see


def _law(holds: Callable[[Any], bool], expected: str) -> Law:
    return lambda name, value: "" if holds(value) else f"`{name}` is {value!r}, expected {expected}"


def _whole(least: int, hint: str = "") -> Law:
    return _law(lambda x: type(x) is int and least <= x <= _MOST, f"an int >= {least}{hint}")


def _names_of(known: frozenset[str], what: str) -> Law:
    def wrong(name: str, value: Any) -> str:
        if not isinstance(value, frozenset):
            return f"`{name}` is a {type(value).__name__}, expected a frozenset of {what} names"
        unknown = sorted(map(str, value - known))
        return f"`{name}` lists {quoted(unknown)}; the {what}s are {quoted(sorted(known))}" if unknown else ""

    return wrong


_sources = _names_of(SOURCES, "source")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


_TEXT = _law(lambda x: isinstance(x, str) and bool(x), "a str that is not empty")
_NAMES = _law(lambda x: isinstance(x, tuple) and all(isinstance(name, str) for name in x), "a tuple of str")
_BOOL = _law(lambda x: isinstance(x, bool), "a bool")
SAYS: dict[Role, dict[str, Law]] = {
    "estimator": {"requires": _sources, "token_measure": _law(lambda x: isinstance(x, str), "a str")},
    "allocator": {
        "requires": _names_of(STATISTICS, "statistic"),
        "needs_importance": _BOOL,
        "needs_curves": _BOOL,
        "split_scope": _law(lambda x: x in get_args(SplitScope), f"one of {quoted(get_args(SplitScope))}"),
    },
    "policy": {
        "requires": _sources,
        "window_rule": _BOOL,
        "rescores": _BOOL,
        "new_entry_score": _law(_is_number, "a number"),
        "num_sink_tokens": _whole(0, ", for example a field `num_sink_tokens: int = 4`"),
        "recent_window": _whole(0),
        "observation_window": _whole(1),
        "attention_power": _law(lambda x: _is_number(x) and 0 < x < math.inf, "a finite number above 0"),
        "repeat_chunk": _whole(1),
    },
    "task": {"names": _NAMES, "metric": _TEXT, "max_new_tokens": _whole(1)},
}
"""What an object of each role says of itself, each with its law."""


def class_problems(role: Role, target: object) -> list[str]:
    """Everything that keeps `target` from filling `role`; empty when it can."""
    if not isinstance(target, type):
        return [f"it is a {type(target).__name__}, not a class"]
    if not issubclass(target, BASES[role]):
        return [*_wrong_base(role, target), *_dataclass_problems(target)]
    problems = [*_abstract_problems(target), *_dataclass_problems(target), *_declared_problems(role, target)]
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


def _declared_problems(role: Role, target: type) -> list[str]:
    """What a class says of its objects. What needs an object, such as a field or a property, is not asked here."""
    declared = {name: inspect.getattr_static(target, name, None) for name in SAYS[role]}
    plain = {name: value for name, value in declared.items() if value is not None and not hasattr(value, "__get__")}
    return [wrong for name, value in plain.items() if (wrong := SAYS[role][name](name, value))]


def _default_problems(role: Role, target: type) -> list[str]:
    try:
        instance = target()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return [f"{target.__name__}() with its defaults raises {describe(error)}"]
    return instance_problems(role, instance)


def instance_problems(role: Role, instance: Any) -> list[str]:
    """What is wrong with what a plugin object says of itself. The object is asked: it may wrap another one."""
    problems = [wrong for name, law in SAYS[role].items() if (wrong := law(name, getattr(instance, name, None)))]
    splits = role == "allocator" and not problems and instance.split_scope != "none"
    if splits and type(instance).split is BudgetAllocator.split:
        problems.append(f"`split_scope` is '{instance.split_scope}' but `split` is not implemented")
    return problems


def build(role: Role, cls: type, params: Mapping[str, Any], owner: str) -> Any:
    """An instance of a checked plugin class; `owner` says in messages who it is ("policy 'x' of dist 1.0").

    A list becomes a tuple where the default is one, since JSON has no tuples.
    Raises `PluginError` for a parameter that is unknown, of the wrong type, or that the class refuses.
    """
    with contained(owner):
        defaults, hints = dataclasses.asdict(cls()), _hints(cls) if params else {}
    problems = [_unknown(name, defaults) for name in params if name not in defaults]
    values: dict[str, Any] = {}
    cause: BaseException | None = None
    for name, value in params.items():
        values[name] = tuple(value) if isinstance(value, list) and isinstance(defaults.get(name), tuple) else value
        if name in defaults and not (is_json(value) and _accepts(hints.get(name, Any), values[name])):
            problems.append(f"'{name}' is {value!r}, expected {inspect.formatannotation(hints.get(name, 'JSON'))}")
    if not problems:
        try:
            made = cls(**values)
            if not (problems := instance_problems(role, made)):
                return made
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            problems, cause = [f"{cls.__name__} refuses {dict(params)}: {describe(error)}"], error
    listed = ", ".join(f"{name} = {default!r}" for name, default in defaults.items())
    raise PluginError(f"{owner}: {'; '.join(problems)}. Its parameters: {listed or 'none'}") from cause


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


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'a', 'b'?)`, or nothing when no known name is close."""
    close = difflib.get_close_matches(name, list(known), n=3)
    return f" (did you mean {quoted(close)}?)" if close else ""
