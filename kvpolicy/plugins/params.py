"""Parameters of plugins as text: NAME=VALUE pairs, and names that carry some, such as `snapkv(kernel_size=7)`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from kvpolicy.errors import PluginError

_NAMED = re.compile(r"([^()]*)(?:\((.*)\))?", re.DOTALL)
_COMMA = re.compile(r",\s*(?=[^\W\d]\w*=)")  # in front of the next NAME=, so that lists need no care


def parse_params(pairs: Iterable[str] | None, owner: str) -> dict[str, Any]:
    """NAME=JSON pairs; a value that is no JSON is taken as text. Raises `PluginError` for a pair without '='.

    owner: an option or a name, for messages
    """
    params = {}
    for pair in pairs or []:
        name, equals, value = pair.strip().partition("=")
        if not equals or not name:
            raise PluginError(f"{owner} expects NAME=VALUE, got '{pair}'")
        try:
            params[name] = json.loads(value)
        except RecursionError:
            raise PluginError(f"{owner} {name}: nested too deeply for a parameter") from None
        except ValueError:
            params[name] = value
    return params


def parse_named(text: str) -> tuple[str, dict[str, Any]]:
    """A plugin's name and parameters: `snapkv(kernel_size=7, pooling=max)`, or the name alone. Raises `PluginError`."""
    match = _NAMED.fullmatch(text)
    if match is None:
        raise PluginError(f"parameters are written as NAME(PARAMETER=VALUE, ...), got '{text}'")
    name, inside = match[1], (match[2] or "").strip()
    return name, parse_params(_COMMA.split(inside) if inside else [], f"'{text}'")


def label_of(name: str, params: Mapping[str, Any]) -> str:
    """What `parse_named` reads: the name, with these parameters if there are any."""
    pairs = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in params.items()]
    return f"{name}({', '.join(pairs)})" if pairs else name
