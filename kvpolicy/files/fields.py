"""Reading JSON: every complaint names the field, what came and what was expected. Values only, no code."""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
from collections import Counter
from collections.abc import Callable
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor

from kvpolicy.errors import KVPolicyError, PlanError
from kvpolicy.files import regular

T = TypeVar("T")

MAX_BYTES = 8 * 2**20
"""Of a document: parsed, a byte can take thirty. Eight levels of 200 layers of 64 KV heads are under 5 MB."""
_MAX_DEPTH = 64
_MAX_WHOLE = 2**31 - 1
_NUMBERS = re.compile(r"\[\n([-+.,eE\d\s]*)\]")  # a raw line end stands in no JSON text
_HALF = re.compile("[\ud800-\udfff]")  # JSON can write it, UTF-8 cannot
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_NO_BRACKET = bytes(set(range(256)) - set(_STEPS))
_KINDS = {dict: "an object", list: "a list", str: "a text", bool: "a boolean", int: "a number", float: "a number"}


def describe(value: object) -> str:
    """A value as an error message shows it: its kind for containers, a shortened literal otherwise."""
    if value is None:
        return "null"
    if isinstance(value, dict | list):
        return _KINDS[type(value)]
    return reprlib.repr(value)


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The file's content. Raises `PlanError` with the reason where it cannot be read or is no plan by its size."""
    try:
        return regular.read_bytes(path, MAX_BYTES)
    except KVPolicyError as error:
        raise PlanError(f"cannot be read: {error}") from None


def render(document: dict[str, Any]) -> str:
    """JSON text with a list of numbers on one line, so that tables read as tables."""
    text = json.dumps(document, allow_nan=False, indent=1)
    return _NUMBERS.sub(lambda match: "[" + " ".join(match[1].split()) + "]", text) + "\n"


def parse(data: bytes) -> Any:
    """The document in `data` (UTF-8). Raises `PlanError` with the place where it stops being JSON.

    Size and depth are looked at first: a parser pays for both.
    """
    if len(data) > MAX_BYTES:
        raise PlanError(f"larger than {MAX_BYTES // 2**20} MiB, was another file given?")
    if _depth(data) > _MAX_DEPTH:
        raise PlanError(f"nested deeper than {_MAX_DEPTH} levels; a plan needs fewer than ten")
    try:
        return json.loads(data.decode("utf-8-sig"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise PlanError(f"byte {error.start} is not UTF-8 text; a plan is JSON, was another file given?") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}"
        if not data.strip():
            raise PlanError("the file is empty, expected a JSON object") from None
        raise PlanError(f"not complete JSON at {place} ({error.msg}); the file is damaged or no plan") from None
    except ValueError as error:  # an integer of thousands of digits
        raise PlanError(f"holds a number that cannot be read ({error})") from None


def _depth(data: bytes) -> int:
    """Brackets that are open at once, at most; those in texts are none."""
    brackets = _STRING.sub(b"", data).translate(None, _NO_BRACKET)
    return max(accumulate(map(_STEPS.__getitem__, brackets)), default=0)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise PlanError(f"field {twice!r} stands twice in one object; keep one")
    return result


def check_json(value: object, path: str, depth: int = 0) -> None:
    """Raises `PlanError`, naming the place, unless `value` is finite, shallow and of JSON's types."""
    if depth > _MAX_DEPTH:
        raise PlanError(f"{path[:80]}... is nested deeper than {_MAX_DEPTH} levels; a plan needs fewer than ten")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise PlanError(f"{path or 'the plan'} has the key {key!r}, expected texts as keys")
            check_json(key, path or "the plan", depth)
            check_json(item, f"{path}.{key}" if path else key, depth + 1)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            check_json(item, f"{path}[{index}]", depth + 1)
    elif isinstance(value, str) and _HALF.search(value):
        raise PlanError(f"{path} is {describe(value)}, which holds half a character (a lone surrogate)")
    elif isinstance(value, float) and not math.isfinite(value):
        raise PlanError(f"{path} is {value}, expected a finite number")
    elif value is not None and not isinstance(value, str | bool | int | float):
        raise PlanError(f"{path} is of type {type(value).__name__}, expected what JSON can hold")


def whole(value: object, path: str, low: int, high: int = _MAX_WHOLE) -> int:
    """An integer from `low` to `high`, by default 2**31 - 1."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise PlanError(f"{path} is {describe(value)}, expected a whole number from {low} to {high}")
    return value


def number(value: object, path: str, low: float = -1e300, high: float = 1e300) -> float:
    """A finite number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PlanError(f"{path} is {describe(value)}, expected a number")
    if abs(value) > 1e300 or not math.isfinite(value):
        raise PlanError(f"{path} is {describe(value)}, expected a finite number")
    if not low <= value <= high:
        raise PlanError(f"{path} is {describe(value)}, expected a number from {low:g} to {high:g}")
    return float(value)


def text(value: object, path: str) -> str:
    """A text."""
    if not isinstance(value, str):
        raise PlanError(f"{path} is {describe(value)}, expected a text")
    return value


def sequence(value: object, path: str, length: int | None = None) -> list[Any]:
    """A list, of `length` items unless None."""
    if not isinstance(value, list):
        raise PlanError(f"{path} is {describe(value)}, expected a list")
    if length is not None and len(value) != length:
        raise PlanError(f"{path} has {len(value)} items, expected {length}")
    return value


def vector(value: object, path: str, length: int) -> Tensor:
    """float64 `[length]`."""
    return torch.tensor(_numbers(value, path, length), dtype=torch.float64)


def _numbers(value: object, path: str, length: int) -> list[float]:
    return [number(item, f"{path}[{i}]") for i, item in enumerate(sequence(value, path, length))]


def table(value: object, path: str, shape: tuple[int, int]) -> Tensor:
    """float64 of `shape` = (budgeted layers, KV heads)."""
    rows = sequence(value, path)
    if len(rows) != shape[0]:
        raise PlanError(f"{path} has {len(rows)} rows, expected {shape[0]}, one per layer in model.budgeted_layers")
    for index, row in enumerate(rows):
        if len(sequence(row, f"{path}[{index}]")) != shape[1]:
            raise PlanError(f"{path}[{index}] has {len(row)} items, expected {shape[1]} (model.num_kv_heads)")
    return torch.tensor([_numbers(row, f"{path}[{i}]", shape[1]) for i, row in enumerate(rows)], dtype=torch.float64)


class Fields:
    """A JSON object at a path. Reads one field after the other; fields that nobody asks for are ignored."""

    def __init__(self, value: object, path: str = "") -> None:
        if not isinstance(value, dict):
            raise PlanError(f"{path or 'the plan'} is {describe(value)}, expected an object")
        self._value = value
        self._path = path

    def path(self, key: str) -> str:
        return f"{self._path}.{key}" if self._path else key

    def has(self, key: str) -> bool:
        """Whether the field is there and not null."""
        return self._value.get(key) is not None

    def raw(self, key: str) -> Any:
        if key not in self._value:
            raise PlanError(f"{self.path(key)} is missing")
        return self._value[key]

    def read(self, key: str, reader: Callable[..., T], *args: Any) -> T:
        """`reader(value, path, *args)` of the field."""
        return reader(self.raw(key), self.path(key), *args)

    def fields(self, key: str) -> Fields:
        return Fields(self.raw(key), self.path(key))

    def mapping(self, key: str) -> dict[str, Any]:
        """A free-form object; absent means empty."""
        if not self.has(key):
            return {}
        return dict(self.fields(key)._value)
